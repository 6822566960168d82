"""The options of `finetune run`. `localrun/run_job.py` does the work."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import shtab

from finetune_cli.commands.options import Commands, add_command, add_endpoint, whole_number
from finetune_cli.localrun.local_job import LocalPaths
from finetune_cli.localrun.run_job import DEFAULT_STORE, RunOptions, run_file

MOST_PROCESSES = 1024
"""Largest number of processes that the command line takes."""
MOST_STEPS = 10**9
CLAIM = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
"""Matches the name of a claim, as in the API server."""

EXAMPLES = """\
examples:
  finetune run job.yaml
  finetune run job.yaml --model ./smollm2 --train rows.jsonl --validation held-out.jsonl
  finetune run job.yaml --dry-run
  finetune run job.yaml --store /data/runs --processes 2
  finetune run job.yaml --volume models=/data/models --volume rows=/data/rows
  finetune run job.yaml --store s3 --endpoint http://127.0.0.1:9000

The runs lie in a folder, laid out as in a bucket. Ctrl-C saves a checkpoint, and the same command goes on from there.
With `--store s3`, and for models and rows in the object store, the access key comes from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY; AWS_CA_BUNDLE names the certificates of the store's CA. A private repository of the Hugging Face
Hub needs HF_TOKEN. No cluster is needed, and no root.

exit code: 0 trained, 1 the training failed, 2 it could not be done here, 3 a required score was not reached,
130 Ctrl-C
"""


def add_run(commands: Commands) -> None:
    """Add `finetune run` to the command line."""
    command = add_command(
        commands,
        "run",
        "train a job on this machine, without a cluster",
        EXAMPLES,
        run,
        description="Train a job on this machine, with its GPUs or its CPUs. No cluster is needed.",
    )
    file = command.add_argument("file", metavar="FILE", help="YAML or JSON file with one job; - for standard input")
    file.complete = shtab.FILE  # type: ignore[attr-defined]
    store = command.add_argument(
        "--store",
        metavar="FOLDER",
        help=f"folder of the runs, or s3 for the job's own object store (default: ./{DEFAULT_STORE})",
    )
    store.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    for option, what in (
        ("--model", "folder with the base model, instead of spec.model"),
        ("--train", "file, folder or glob with the training rows, instead of dataset.train"),
        ("--validation", "the same for dataset.validation"),
        ("--test", "the same for dataset.test"),
    ):
        path = command.add_argument(option, metavar="PATH", help=what)
        path.complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument(
        "--volume",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        type=volume,
        help="folder in place of the volume with this claimName; may be repeated",
    )
    command.add_argument(
        "--processes",
        type=whole_number(1, MOST_PROCESSES),
        metavar="N",
        help="number of training processes (default: nodes x gpusPerNode of the job)",
    )
    command.add_argument("--device", choices=("gpu", "cpu"), help="default: that of the job; the CPU without a GPU")
    add_endpoint(command)
    command.add_argument("--fresh", action="store_true", help="train anew, beside the runs that are in the store")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing; show the plan, the run file, and the first examples as text and tokens",
    )
    command.add_argument(
        "--every", type=whole_number(1, MOST_STEPS), metavar="N", help="steps between two lines in a pipe"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    given = {"--model": options.model, "--train": options.train}
    given |= {"--validation": options.validation, "--test": options.test}
    return run_file(
        RunOptions(
            file=options.file,
            store=options.store,
            paths=LocalPaths(
                sources={option: path for option, path in given.items() if path is not None},
                volumes=dict(options.volume),
            ),
            processes=options.processes,
            device=options.device.upper() if options.device else None,
            endpoint=options.endpoint,
            every=options.every,
            fresh=options.fresh,
            dry_run=options.dry_run,
        )
    )


def volume(text: str) -> tuple[str, Path]:
    """Return the name of the claim and the folder in ``text``. argparse shows the error of this function."""
    name, equals, folder = text.partition("=")
    if not equals or not folder or re.fullmatch(CLAIM, name) is None:
        raise argparse.ArgumentTypeError("must be the name of a claim and a folder, such as models=/data/models")
    return name, Path(folder)
