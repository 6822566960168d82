"""`finetune list`: shows the jobs of a namespace, or of all namespaces, as a table or for programs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_cli.apiserver.following import JobFollower
from finetune_cli.apiserver.job_client import JobClient, parse
from finetune_cli.apiserver.selection import Selection, key_of
from finetune_cli.commands.options import (
    RESOURCE,
    Commands,
    add_command,
    add_jobs,
    add_place,
    add_selector,
    jobs_of,
    selection_of,
)
from finetune_cli.terminal import complain, printable_values, say, say_json, say_yaml
from finetune_cli.views.columns import print_columns
from finetune_cli.views.job_table import Listed, in_order, job_columns, job_rows
from finetune_core.api.job import KIND
from finetune_core.errors import UserError

EXAMPLES = """\
examples:
  finetune list                                     jobs of the current namespace
  finetune list -A -o wide                          of all namespaces, with model, artifact and message
  finetune list -n research -l team=nlp
  finetune list -o name | xargs finetune suspend    the output of -o name is understood as a name
  finetune list -o json | jq -r '.items[] | select(.spec.method == "Full").metadata.name'
"""


def add_list(commands: Commands) -> None:
    """Add `finetune list` to the command line."""
    command = add_command(commands, "list", "show the jobs of a namespace", EXAMPLES, list_jobs)
    add_jobs(command, "*", "names of the jobs (default: all)")
    add_place(command)
    add_selector(command)
    command.add_argument(
        "-o", "--output", choices=("wide", "json", "yaml", "name"), help="wide shows more columns; json for programs"
    )


def list_jobs(options: argparse.Namespace) -> int:
    """Print the jobs that the command line names, and return 0."""
    jobs = jobs_of(options)
    selection = selection_of(options, jobs)
    found = stored_jobs(jobs, selection)
    if options.output in ("json", "yaml"):
        listing = {"apiVersion": "v1", "kind": "List", "items": [without_managed_fields(job) for job in found]}
        (say_json if options.output == "json" else say_yaml)(listing)
        return 0
    if options.output == "name":
        for job in found:
            say(f"{RESOURCE}/{key_of(job).name}")
        return 0
    if not found:
        chosen = f" with the labels {options.selector}" if options.selector else ""
        hint = "" if options.all_namespaces else "; `finetune list -A` looks into all namespaces"
        complain(f"no {KIND} in {selection.place}{chosen}{hint}")
        return 0
    everywhere, wide = selection.namespace is None, options.output == "wide"
    rows = job_rows(in_order(listed(found)), datetime.now(UTC), namespaces=everywhere, wide=wide)
    print_columns(job_columns(namespaces=everywhere, wide=wide), rows, whole=wide)
    return 0


def stored_jobs(jobs: JobClient, selection: Selection) -> list[dict[str, Any]]:
    """Return the jobs of ``selection`` as the API server stores them, by namespace and name. Raises UserError where a
    named job does not exist."""
    found, _ = JobFollower(jobs.api, selection).stored_jobs()
    jobs.require(selection.names, found)
    return [found[key] for key in sorted(found)]


def listed(found: Iterable[Mapping[str, Any]]) -> list[Listed]:
    """Return stored jobs as rows of the table of jobs. A job that this version can't read has the reason in its row."""
    rows = []
    for stored in found:
        try:
            rows.append(Listed(*key_of(stored), stored, parse(printable_values(stored))))
        except UserError as error:
            rows.append(Listed(*key_of(stored), stored, None, error.problem))
    return rows


def without_managed_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``stored`` without the record of who wrote which field, which kubectl does not show either."""
    metadata = {name: value for name, value in stored["metadata"].items() if name != "managedFields"}
    return {**stored, "metadata": metadata}
