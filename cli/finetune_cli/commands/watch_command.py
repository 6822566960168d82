"""`finetune watch`: shows one job as a live panel, or several as a live table, until they have ended."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from finetune_cli.apiserver.following import JobFollower, Snapshot
from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.apiserver.selection import Selection
from finetune_cli.commands.list_command import listed
from finetune_cli.commands.options import (
    Commands,
    add_command,
    add_jobs,
    add_place,
    add_selector,
    jobs_of,
    seconds,
    selection_of,
)
from finetune_cli.state import Ending, ending
from finetune_cli.terminal import SafeConsole, complain
from finetune_cli.views.live_table import JobsView, jobs_view_for
from finetune_cli.views.watch import show_until_ended, view_for
from finetune_core.api.conditions import Reason
from finetune_core.api.job import KIND
from finetune_core.errors import UserError

GATE_FAILED_CODE = 3
"""Exit code for a job whose model is trained, but did not reach a score of `evaluation.require`."""
EXAMPLES = """\
examples:
  finetune watch quickstart                   until it has ended; Ctrl-C leaves the job alone
  finetune watch quickstart -n research | tee job.log
  finetune watch quickstart && finetune download quickstart
  finetune watch lora-1e-4 lora-3e-5          a table, until all of them have ended
  finetune watch                              all jobs of the namespace, until Ctrl-C or --timeout
  finetune watch -A -l team=nlp

exit code: 0 the jobs succeeded, 1 one did not, 2 they cannot be watched,
           3 the model is trained, but did not reach a score of evaluation.require
"""


def add_watch(commands: Commands) -> None:
    """Add `finetune watch` to the command line."""
    command = add_command(
        commands,
        "watch",
        "show jobs live until they have ended",
        EXAMPLES,
        watch_jobs,
        description="Show a job live until it has ended, or several jobs as a live table.",
    )
    add_jobs(command, "*", "names of the jobs (default: all of the namespace)")
    add_place(command)
    add_selector(command)
    command.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="give up watching after so long (default: never)"
    )


def watch_jobs(options: argparse.Namespace) -> int:
    """Show the jobs that the command line names. Return 0 when all of them succeeded. Otherwise print the reasons, and
    return 3 where only required scores were not reached, else 1. Without names, return 0 when the time is over."""
    jobs = jobs_of(options)
    selection = selection_of(options, jobs)
    try:
        if len(selection.names) == 1:
            ends = _watch_one(jobs, selection.names[0], options.timeout)
        else:
            ends = _watch_several(jobs, selection, options.timeout)
    except TimeoutError as error:
        if not selection.names:
            return 0
        raise UserError(", ".join(selection.names), f"has not ended after {options.timeout:g} s") from error
    failed = {name: end for name, end in ends.items() if not end.succeeded}
    for name, end in failed.items():
        complain(f"finetune: {name}: {end.reason}: {end.message}")
    return exit_code(failed.values())


def exit_code(failed: Iterable[Ending]) -> int:
    """Return the exit code for the ends of those jobs that did not succeed."""
    reasons = {end.reason for end in failed}
    if not reasons:
        return 0
    return GATE_FAILED_CODE if reasons == {Reason.GATE_FAILED} else 1


def _watch_one(jobs: JobClient, name: str, timeout: float | None) -> dict[str, Ending]:
    with view_for(SafeConsole()) as view:
        return {name: show_until_ended(jobs.follow(name, view.show_notice, give_up_after=timeout), view)}


def _watch_several(jobs: JobClient, selection: Selection, timeout: float | None) -> dict[str, Ending]:
    """Show the jobs of ``selection`` until all named ones have ended, or for ever where none is named."""
    with jobs_view_for(SafeConsole(), namespaces=selection.namespace is None, place=selection.place) as view:
        found = JobFollower(jobs.api, selection).follow(view.show_notice, give_up_after=timeout)
        return show_all(jobs, selection, found, view)


def show_all(jobs: JobClient, selection: Selection, snapshots: Iterable[Snapshot], view: JobsView) -> dict[str, Ending]:
    """Show each of ``snapshots``, the states of the jobs of ``selection``, in ``view``. Return how the named jobs have
    ended, once all of them have. Raises UserError where a named job does not exist or is deleted."""
    known: set[str] = set()
    for found in snapshots:
        there = {key.name for key in found}
        gone = next((name for name in selection.names if name in known and name not in there), None)
        if gone is not None:
            raise UserError(f"{KIND} {jobs.namespace}/{gone}", "was deleted")
        jobs.require(selection.names, found)
        known |= there
        rows = listed(found.values())
        view.show_jobs(rows)
        ends = {row.name: ending(row.job) for row in rows if row.job is not None}
        if selection.names and all(ends.get(name) is not None for name in selection.names):
            return {name: end for name, end in ends.items() if end is not None}
    raise EOFError("the stream of states ended before the jobs did")
