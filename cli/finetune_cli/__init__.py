"""The command line `finetune`: validates job files, watches FineTuneJobs, lists their checkpoints, downloads their
artifacts and compares their runs.

Each command of the program has its own module. Code that the operator or the trainer needs too is in core/.
"""

__version__ = "0.1.0"
"""Version of the command line, equal to that of the operator. `finetune --version` shows it."""
