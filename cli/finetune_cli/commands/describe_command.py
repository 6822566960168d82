"""`finetune describe`: shows everything about a job: conditions, attempts and why they ended, plan, notices, events."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from finetune_cli.apiserver.job_client import JobClient, parse
from finetune_cli.apiserver.job_events import JobEvent, read_events
from finetune_cli.commands.list_command import without_managed_fields
from finetune_cli.commands.options import Commands, add_command, add_jobs, add_place, jobs_of
from finetune_cli.terminal import print_page, printable_values, say, say_json, say_yaml
from finetune_cli.views.description import description
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError

EXAMPLES = """\
examples:
  finetune describe quickstart
  finetune describe quickstart -n research | less
  finetune describe quickstart -o yaml              the job as the API server has it
  finetune describe quickstart -o json | jq '.status.attempts.recent'
"""


def add_describe(commands: Commands) -> None:
    """Add `finetune describe` to the command line."""
    command = add_command(
        commands,
        "describe",
        "show everything about a job",
        EXAMPLES,
        describe_jobs,
        description="Show a job's conditions, its attempts and why they ended, its plan, results, notices and events,"
        " and what to do.",
    )
    add_jobs(command, "+", "names of the jobs")
    add_place(command)
    command.add_argument("-o", "--output", choices=("text", "json", "yaml"), default="text", help="json for programs")


def describe_jobs(options: argparse.Namespace) -> int:
    """Print the jobs that the command line names, and return 0."""
    jobs = jobs_of(options)
    for index, name in enumerate(dict.fromkeys(options.names)):
        stored = jobs.get_stored(name)
        if options.output == "json":
            say_json(without_managed_fields(stored))
        elif options.output == "yaml":
            say_yaml(without_managed_fields(stored), first=index == 0)
        else:
            job = parse(printable_values(stored))
            if index:
                say("")
            print_page(description(job, _events(jobs, job), datetime.now(UTC)))
    return 0


def _events(jobs: JobClient, job: FineTuneJob) -> Sequence[JobEvent] | str:
    """Return the events of ``job``, or why the user can't see them."""
    try:
        return read_events(jobs.api, jobs.namespace, job.metadata.name, job.metadata.uid)[0]
    except UserError as error:
        return str(error)
