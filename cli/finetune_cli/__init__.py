"""The command line `finetune`: validates job files, watches FineTuneJobs, lists their checkpoints
and downloads their artifacts.

Each command of the program has its own module. Code that operator or trainer need too belongs into core/.
"""
