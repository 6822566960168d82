"""`finetune events`: shows the Kubernetes events about a job, its PyTorchJobs and its pods."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from finetune_cli.apiserver.job_events import read_events
from finetune_cli.apiserver.selection import key_of
from finetune_cli.commands.list_command import without_managed_fields
from finetune_cli.commands.options import Commands, add_command, add_job, add_place, jobs_of
from finetune_cli.terminal import complain, say_json, say_yaml
from finetune_cli.views.columns import print_columns
from finetune_cli.views.description import EVENT_COLUMNS, event_rows

EXAMPLES = """\
examples:
  finetune events quickstart
  finetune events quickstart -n research
  finetune events quickstart -o json | jq -r '.items[] | select(.type == "Warning").note'
"""


def add_events(commands: Commands) -> None:
    """Add `finetune events` to the command line."""
    command = add_command(
        commands,
        "events",
        "show the events of a job",
        EXAMPLES,
        show_events,
        description="Show the events about a job, its PyTorchJobs and its pods, the oldest first. The API server keeps"
        " an event for an hour by default.",
    )
    add_job(command)
    add_place(command)
    command.add_argument("-o", "--output", choices=("text", "json", "yaml"), default="text", help="json for programs")


def show_events(options: argparse.Namespace) -> int:
    """Print the events of the job, and return 0."""
    jobs = jobs_of(options)
    stored = jobs.get_stored(options.name)
    events, raw = read_events(jobs.api, *key_of(stored), stored["metadata"]["uid"])
    if options.output != "text":
        listing = {"apiVersion": "v1", "kind": "List", "items": [without_managed_fields(event) for event in raw]}
        (say_json if options.output == "json" else say_yaml)(listing)
    elif events:
        print_columns(EVENT_COLUMNS, event_rows(events, datetime.now(UTC)))
    else:
        complain(
            f"no events about {options.name}: the API server keeps an event for an hour by default;"
            f" `finetune describe {options.name}` shows the attempts"
        )
    return 0
