"""`finetune metrics`: writes the figures of every step of a job, as the bucket has them, as CSV, JSON or parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab
from rich.text import Text

from finetune_cli.bucket.checkpoints import root_of
from finetune_cli.bucket.step_files import Format, csv_lines, json_lines, write_rows
from finetune_cli.bucket.step_log import read_steps
from finetune_cli.commands.job_store import store_of
from finetune_cli.commands.options import Commands, add_command, add_endpoint, add_job, add_place, jobs_of
from finetune_cli.terminal import SafeConsole, say
from finetune_core.errors import UserError

EXAMPLES = """\
examples:
  finetune metrics quickstart                              CSV, one line for each step
  finetune metrics quickstart -o json | jq '.[-1].loss'
  finetune metrics quickstart --to steps.parquet           the ending of the name chooses the format
  finetune metrics quickstart --every-run --to steps.csv   also steps that a rollback left behind

The trainer writes the rows of the steps with each checkpoint, so that the newest steps of a running job may be missing.
Credentials are found as for `finetune download`.
"""


def add_metrics(commands: Commands) -> None:
    """Add `finetune metrics` to the command line."""
    command = add_command(
        commands,
        "metrics",
        "write the figures of every step, as the bucket has them",
        EXAMPLES,
        write_metrics,
        description="Write loss, learning rate, speed, memory and scores of every step, as CSV, JSON or parquet.",
    )
    add_job(command)
    add_place(command)
    command.add_argument(
        "-o", "--output", choices=[form.value for form in Format], help="default: csv, or the ending of --to"
    )
    target = command.add_argument("--to", type=Path, metavar="FILE", help="write a file (default: the standard output)")
    target.complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument(
        "--every-run", action="store_true", help="rows of all runs, also of those that a later run did not continue"
    )
    add_endpoint(command)


def write_metrics(options: argparse.Namespace) -> int:
    """Write the rows of the job's step log, and return 0."""
    form = format_of(options.output, options.to)
    jobs = jobs_of(options)
    job = jobs.get(options.name)
    store, root = store_of(job, jobs, options.endpoint), root_of(job)
    with SafeConsole(stderr=True).status("looking at the bucket") as status:
        rows = read_steps(store, root, every_run=options.every_run, progress=lambda file: status.update(Text(file)))
    if options.to is not None:
        write_rows(rows, form, options.to)
        say(f"{options.to}: {len(rows)} steps")
        return 0
    for line in csv_lines(rows) if form is Format.CSV else json_lines(rows):
        say(line)
    return 0


def format_of(output: str | None, target: Path | None) -> Format:
    """Return the format that the command line asks for. Raises UserError where the ending of the file's name says none,
    and for parquet without a file."""
    ending = target.suffix.removeprefix(".").lower() if target is not None else Format.CSV.value
    known = ", ".join(f".{form.value}" for form in Format)
    if output is None and ending not in [form.value for form in Format]:
        raise UserError("--to", f"must end in one of {known}, or `-o` must name the format")
    form = Format(output or ending)
    if form is Format.PARQUET and target is None:
        raise UserError("-o parquet", "needs a file, because parquet is no text; name it with `--to`")
    return form
