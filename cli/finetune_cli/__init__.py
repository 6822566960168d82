"""The command line `finetune`: checks job files, shows and steers FineTuneJobs, fetches what they made and compares
their runs.

Each command of the program has its own module in `commands/`. Code that the operator or the trainer needs too is in
core/.
"""

__version__ = "0.1.0"
"""Version of the command line, equal to that of the operator. `finetune --version` shows it."""
