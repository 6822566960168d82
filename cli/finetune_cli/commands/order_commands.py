"""`finetune suspend`, `finetune resume` and `finetune cancel`: set `runPolicy.suspend` and `runPolicy.cancel` of jobs.

What a job is told is decided by `order`, a pure function.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.apiserver.selection import key_of
from finetune_cli.commands.list_command import stored_jobs
from finetune_cli.commands.options import (
    Commands,
    add_command,
    add_jobs,
    add_place,
    add_selector,
    jobs_of,
    selection_of,
)
from finetune_cli.terminal import complain, say
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import KIND
from finetune_core.errors import UserError


class Order(StrEnum):
    """What the three commands tell a job."""

    SUSPEND = "suspend"
    RESUME = "resume"
    CANCEL = "cancel"


EXAMPLES = {
    Order.SUSPEND: """\
examples:
  finetune suspend quickstart                 the pods save a checkpoint and go
  finetune suspend -n research -l team=nlp
  finetune resume quickstart                  the next attempt goes on from the checkpoint
""",
    Order.RESUME: """\
examples:
  finetune resume quickstart
  finetune resume -n research -l team=nlp
  finetune watch quickstart
""",
    Order.CANCEL: """\
examples:
  finetune cancel quickstart                  the pods save a checkpoint, and the job ends
  finetune cancel quickstart other-job
  finetune cancel -l experiment=lr-sweep

A cancelled job can't be resumed. A new job with the same name and training goes on from its checkpoint.
""",
}
SUMMARIES = {
    Order.SUSPEND: "make jobs save a checkpoint and give their GPUs back",
    Order.RESUME: "let suspended jobs go on",
    Order.CANCEL: "make jobs save a checkpoint and end for good",
}
SAID = {
    Order.SUSPEND: "is being suspended; `finetune resume` lets it go on",
    Order.RESUME: "goes on from its newest checkpoint",
    Order.CANCEL: "is being cancelled; its checkpoints stay",
}
GIT = {
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "argocd.argoproj.io/instance": "Argo CD",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
}
"""Annotations and labels of jobs that a program applies from Git, and the name of the program."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a job is told: the new fields of `runPolicy`, and a sentence. No fields: there is nothing to change."""

    fields: Mapping[str, bool]
    sentence: str


def add_orders(commands: Commands) -> None:
    """Add `finetune suspend`, `resume` and `cancel` to the command line."""
    for order in Order:
        command = add_command(commands, order.value, SUMMARIES[order], EXAMPLES[order], give_orders)
        add_jobs(command, "*", "names of the jobs")
        add_place(command)
        add_selector(command, all_namespaces=False)
        command.set_defaults(order=order)


def give_orders(options: argparse.Namespace) -> int:
    """Give the order to the jobs that the command line names. Return 0 where every job has it, else 2. A job that can't
    obey is named, and does not keep the others from the order."""
    if not options.names and not options.selector:
        raise UserError("NAME", f"must name the jobs to {options.order}, or `-l` must select them by labels")
    jobs = jobs_of(options)
    names, selection = options.names, selection_of(options, jobs)
    if selection.labels:
        names = [key_of(job).name for job in stored_jobs(jobs, selection)]
        if not names:
            raise UserError("-l", f"selects no {KIND} in namespace {jobs.namespace}; `finetune list` shows the labels")
    code = 0
    for name in dict.fromkeys(names):
        try:
            _give_order(jobs, name, options.order)
        except UserError as error:
            complain(f"finetune: {error}")
            code = 2
    return code


def _give_order(jobs: JobClient, name: str, order: Order) -> None:
    told = Told({}, "")

    def decide(stored: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal told
        told = tell(order, stored)
        return {"spec": {"runPolicy": dict(told.fields)}} if told.fields else None

    stored = jobs.change(name, decide)
    say(f"{name} {told.sentence}")
    program = applied_by(stored) if stored is not None else None
    if program is not None:
        complain(
            f"finetune: {name}: {program} applies this job from Git and may take the change back; change it there too"
        )


def tell(order: Order, stored: Mapping[str, Any]) -> Told:
    """Return what the job ``stored``, as the API server has it, is told by ``order``. Raises UserError where the job
    can't obey any more. The job need not fit this version of the program."""
    subject = f"{KIND} {'/'.join(key_of(stored))}"
    policy = (stored.get("spec") or {}).get("runPolicy") or {}
    state = _ended_as(stored)
    if state is not None:
        raise UserError(
            subject, f"has ended ({state}) and can't be told to {order}; `finetune describe` says how it ended"
        )
    if policy.get("cancel") is True:
        if order is Order.CANCEL:
            return Told({}, "is being cancelled already")
        raise UserError(
            subject,
            f"is being cancelled and can't be told to {order}; a new job with the same name and training goes on from"
            " its checkpoint",
        )
    suspended = policy.get("suspend") is True
    if order is Order.CANCEL:
        return Told({"cancel": True}, SAID[order])
    if suspended == (order is Order.SUSPEND):
        return Told({}, "is suspended already" if suspended else "is not suspended")
    return Told({"suspend": order is Order.SUSPEND}, SAID[order])


def _ended_as(stored: Mapping[str, Any]) -> str | None:
    for condition in (stored.get("status") or {}).get("conditions") or []:
        if condition.get("type") == ConditionType.SUCCEEDED and condition.get("status") in ("True", "False"):
            return str(condition.get("reason") or "unknown")
    return None


def applied_by(stored: Mapping[str, Any]) -> str | None:
    """Return the program that applies the job from Git, or None where none is known."""
    metadata = stored["metadata"]
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    return next((program for mark, program in GIT.items() if mark in marks), None)
