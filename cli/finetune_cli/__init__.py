"""The command line `finetune`: validates job files, watches FineTuneJobs, and fetches their checkpoints and artifacts.

Each command has its own module. Code that operator or trainer need too belongs into core/.
"""
