"""Runs the program `finetune` where it is started as `python -m finetune_cli`."""

import sys

from finetune_cli.main import main

sys.exit(main())
