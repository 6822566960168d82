"""The command line `finetune`: validates job files, watches FineTuneJobs, lists their checkpoints and downloads their
artifacts.

Each command of the program has its own module. Code that the operator or the trainer needs too is in core/.
"""
