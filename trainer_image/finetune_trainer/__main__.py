"""`python -m finetune_trainer`: the entry point of the trainer image, PID 1 of every training pod."""

from __future__ import annotations

import signal

# Before anything that takes time to import: the kernel drops a signal that PID 1 neither handles nor blocks.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from finetune_trainer.launcher import run  # noqa: E402
from finetune_trainer.settings import Paths  # noqa: E402

EXAMPLES = """\
examples:
  python -m finetune_trainer
      in a pod: everything lies where the operator mounts it

  FTJ_NAMESPACE=default FTJ_NAME=try FTJ_UID=1 FTJ_ATTEMPT=1 FTJ_POD_NAME=try-0 FTJ_POD_UID=1 \\
  PET_NODE_RANK=0 PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT=23456 \\
  python -m finetune_trainer --run-file run.json --credentials keys --scratch /tmp/try --termination-log result.json
      outside a pod: one process per node of `world.nodes` in run.json, each with its own scratch folder

exit codes:
  0 done, 64 bad input, 65 diverged, 66 out of memory, 75 something outside failed, 143 stopped with a checkpoint
"""


def parse(arguments: list[str]) -> Paths:
    """Return the paths that the command line asks for; each defaults to its place in a pod."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Train one node's part of a FineTuneJob attempt; identity comes from the environment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in Paths.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=Path, default=field.default, metavar="PATH", help=f"default: {field.default}")
    values = vars(parser.parse_args(arguments))
    return Paths(**{name: path.absolute() for name, path in values.items()})


if __name__ == "__main__":
    code = run(parse(sys.argv[1:]), os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    # A download that was left behind must not hold the process.
    os._exit(code)
