"""The command line `finetune`: validates job files, watches FineTuneJobs, and fetches their checkpoints and artifacts.

Each command has a module of its own. Code that operator or trainer need too belongs into core/.
"""
