"""The command line of the program `finetune`: its commands in the order in which the help lists them.

`main.py` parses with it, and `finetune completion` makes the scripts of shells from it.
"""

from __future__ import annotations

import argparse

from finetune_cli import __version__
from finetune_cli.commands.checkpoints_command import add_checkpoints
from finetune_cli.commands.compare_command import add_compare
from finetune_cli.commands.completion_command import add_completion
from finetune_cli.commands.describe_command import add_describe
from finetune_cli.commands.download_command import add_download
from finetune_cli.commands.events_command import add_events
from finetune_cli.commands.list_command import add_list
from finetune_cli.commands.logs_command import add_logs
from finetune_cli.commands.metrics_command import add_metrics
from finetune_cli.commands.order_commands import add_orders
from finetune_cli.commands.plan_command import add_plan
from finetune_cli.commands.run_command import add_run
from finetune_cli.commands.validate_command import add_validate
from finetune_cli.commands.watch_command import add_watch

PROGRAM = "finetune"
PLUGIN = "kubectl-finetune"
"""Name of the program that kubectl starts for `kubectl finetune`."""
EXAMPLES = """\
examples:
  finetune validate job.yaml && kubectl apply -f job.yaml
  finetune plan job.yaml --model-config config.json
  finetune run job.yaml
  finetune list -A
  finetune watch quickstart
  finetune describe quickstart -n research
  finetune logs quickstart -f
  finetune suspend quickstart
  finetune checkpoints quickstart
  finetune metrics quickstart --to steps.csv
  finetune download quickstart -o ./adapter
  finetune compare lora full

`finetune COMMAND --help` has examples of each command. `kubectl finetune` is the same program.
"""


def command_line(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Return the parser of the command line. ``program`` is how the help calls the program."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Check, plan and run job files, watch and steer FineTuneJobs, fetch what they made, compare runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the warnings of libraries too")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        add_validate,
        add_plan,
        add_run,
        add_list,
        add_describe,
        add_watch,
        add_logs,
        add_events,
        add_orders,
        add_checkpoints,
        add_metrics,
        add_download,
        add_compare,
    ):
        add(commands)
    add_completion(commands, command_line)
    return parser


def program_of(path: str) -> str:
    """Return how the help calls the program that was started as ``path``."""
    return "kubectl finetune" if path.rpartition("/")[2].startswith(PLUGIN) else PROGRAM
