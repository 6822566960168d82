"""The command line `finetune`: what a person does with a FineTuneJob from a terminal."""
