"""`python -m finetune_trainer`: the entry point of the trainer image and PID 1 of every training pod. With the argument
`preflight` the program is PID 1 of the preflight pod, which checks a job before the operator requests GPUs.
"""

from __future__ import annotations

import signal

# The signals are blocked before the slow imports, because the kernel drops a signal that PID 1 neither handles nor
# blocks.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND  # noqa: E402
from finetune_trainer.launcher import run  # noqa: E402
from finetune_trainer.pod.settings import Paths  # noqa: E402
from finetune_trainer.pod.signals import end_with_parent  # noqa: E402
from finetune_trainer.preflight.entrypoint import run as preflight  # noqa: E402

EXAMPLES = """\
examples:
  python -m finetune_trainer
      in a pod: everything lies where the operator mounts it

  FTJ_NAMESPACE=default FTJ_NAME=try FTJ_UID=1 FTJ_ATTEMPT=1 FTJ_POD_NAME=try-0 FTJ_POD_UID=1 \\
  PET_NODE_RANK=0 PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT=23456 \\
  python -m finetune_trainer --run-file run.json --credentials keys --scratch /tmp/try --termination-log result.json
      outside a pod: one process per node of `world.nodes` in run.json, each with its own scratch folder

  python -m finetune_trainer preflight --run-file run.json --credentials keys --scratch /tmp/try --termination-log log
      check store, model and data of run.json, without training: the findings are in log

exit codes:
  0 done, 64 bad input, 65 diverged, 66 out of memory, 75 something outside failed, 143 stopped with a checkpoint
"""


class Arguments(NamedTuple):
    """The command line. In a pod only `only_check` differs from its default."""

    only_check: bool
    """Whether the command is `preflight`."""
    paths: Paths
    parent: int | None
    """The process with which this one ends."""
    first_examples: Path | None
    """File for the first examples of the training rows."""


def parse(arguments: list[str]) -> Arguments:
    """Return the command line. The default of each path is its mount path in a pod."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Train one node's part of a FineTuneJob attempt; identity comes from the environment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "check the job's store, model and data instead of training"
    parser.add_argument("command", nargs="?", choices=[PREFLIGHT_COMMAND], help=what)
    for name, field in Paths.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=Path, default=field.default, metavar="PATH", help=f"default: {field.default}")
    parser.add_argument("--parent", type=int, metavar="PID", help="stop as after SIGTERM when this process has ended")
    parser.add_argument(
        "--first-examples", type=Path, metavar="FILE", help="with preflight: write the first examples into this file"
    )
    given = parser.parse_args(arguments)
    paths = Paths(**{name: getattr(given, name).absolute() for name in Paths.model_fields})
    return Arguments(given.command == PREFLIGHT_COMMAND, paths, given.parent, given.first_examples)


def main() -> int:
    """Run the training or the preflight checks, and return the exit code."""
    given = parse(sys.argv[1:])
    if given.parent is not None:
        end_with_parent(given.parent)
    if given.only_check:
        return preflight(given.paths, os.environ, first_examples=given.first_examples)
    return run(given.paths, os.environ)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # End with `os._exit`, which does not wait for threads: one of them may still run a download that was abandoned
    # after SIGTERM.
    os._exit(code)
