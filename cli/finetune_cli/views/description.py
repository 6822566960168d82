"""The page that `finetune describe` prints about a job: what it is, how it stands, why its attempts ended, and what to
do next. A pure function from a FineTuneJob and its events to renderables of the library rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune_cli.apiserver.job_events import JobEvent
from finetune_cli.formatting import age, duration, number, seconds_between, size, with_zone
from finetune_cli.state import ending, risen_text, state, status_of, task_of
from finetune_cli.views.columns import Column, ColumnTable
from finetune_cli.views.job_table import model_of
from finetune_cli.views.panel import progress_line, state_line
from finetune_cli.views.sections import (
    artifact_lines,
    attempt_table,
    checkpoint_table,
    curves,
    headed_table,
    incident_table,
    requirement_table,
    score_table,
    ungraded_lines,
)
from finetune_core.api.attempt_causes import CAUSES, DISRUPTIONS, Cause
from finetune_core.api.condition_reasons import NOTHING, REASONS
from finetune_core.api.conditions import Reason
from finetune_core.api.job import FineTuneJob
from finetune_core.api.sources import DataSource
from finetune_core.api.status import PlanStatus

EVENTS_SHOWN = 20
"""Largest number of events on the page."""
EVENT_COLUMNS = (
    Column("LAST SEEN", right=True),
    Column("TYPE", spare=1),
    Column("REASON"),
    Column("OBJECT", spare=2),
    Column("MESSAGE", folds=True),
)


def description(job: FineTuneJob, events: Sequence[JobEvent] | str, now: datetime) -> RenderableType:
    """Return the page about ``job``. ``events`` are the job's events, or the sentence why they can't be shown. ``now``
    is the current time, with a time zone."""
    status = status_of(job)
    parts: list[RenderableType] = [Text(job.metadata.name, style="bold"), _facts(job, now), Text(), state_line(job)]
    if words := advice(job):
        parts.append(Text(f"  What to do: {words}", style="dim"))
    if status.progress and status.progress.total_steps:
        parts += [Text(), progress_line(job, now)]
    if (drawn := curves(job)) is not None:
        parts += [Text(), drawn]
    parts += [Text(), _conditions(job, now)]
    if status.preflight is not None:
        parts += [Text(), _preflight(job, now)]
    if status.attempts.started:
        parts += [Text(), attempt_table(status, now, everything=True), *_causes(job), *_pods(job)]
    if status.plan is not None:
        parts += [Text(), _plan(status.plan)]
    if status.checkpoints:
        parts += [Text(), checkpoint_table(status.checkpoints)]
    if status.evaluation is not None:
        parts += [Text(), score_table(status.evaluation, task_of(job))]
        if meaning := risen_text(status.evaluation):
            parts.append(Text(f"  {meaning}", style="dim"))
        parts += ungraded_lines(status.evaluation)
        if status.evaluation.requirements:
            parts += [Text(), requirement_table(status.evaluation)]
    if status.incidents:
        parts += [Text(), incident_table(status.incidents)]
    if status.notices:
        parts += [Text(), Text("notices", style="dim"), *(_bullet(notice) for notice in status.notices)]
    if status.artifact is not None:
        parts += [Text(), artifact_lines(status.artifact)]
    parts += [Text(), *_events(events, now)]
    # Each line below the heading is indented, so that no text of the cluster that is broken into lines begins a line
    # that looks like one of the program.
    heading, *body = parts
    return Group(heading, Padding(Group(*body), (0, 0, 0, 2)))


def advice(job: FineTuneJob) -> str:
    """Return what a person should do about the job's state, in the words of docs/api.md. The result is empty where
    there is nothing to do, or where the state is of another version."""
    try:
        found = REASONS[Reason(state(job))].advice
    except ValueError:
        return ""
    return "" if found == NOTHING else found.replace("NAME", job.metadata.name)


def event_rows(events: Iterable[JobEvent], now: datetime) -> list[list[str | Text]]:
    """Return a row of cells for each event, for the columns EVENT_COLUMNS."""
    rows: list[list[str | Text]] = []
    for event in events:
        times = f" (x{event.count})" if event.count > 1 else ""
        kind = Text("Warning", style="yellow") if event.warning else Text("Normal")
        seen = f"{age(seconds_between(event.last, now))}{times}"
        rows.append([seen, kind, event.reason, event.about, event.message])
    return rows


def _facts(job: FineTuneJob, now: datetime) -> RenderableType:
    metadata, spec, status = job.metadata, job.spec, status_of(job)
    resources = spec.resources
    devices = "CPU" if resources.device == "CPU" else f"{resources.gpus_per_node} GPU each ({resources.gpu_product})"
    method = str(spec.method)
    if spec.lora is not None:
        method += f", rank {spec.lora.rank}" if spec.lora.rank is not None else ""
    data = [("train", spec.dataset.train), ("validation", spec.dataset.validation), ("test", spec.dataset.test)]
    facts = {
        "namespace": metadata.namespace,
        "uid": metadata.uid,
        "created": _created(metadata.creation_timestamp, now),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(metadata.labels.items())),
        "model": model_of(job),
        **{name: _data(source) for name, source in data if source is not None},
        "method": method,
        "machines": f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}, {devices}",
        "storage": spec.storage.uri,
        "queue": spec.run_policy.queue_name or "",
        "image": status.image or "",
        "used": _usage(job),
        "deleting": "yes" if metadata.deletion_timestamp else "",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value:
            table.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
    return table


def _created(text: str, now: datetime) -> str:
    try:
        created = with_zone(datetime.fromisoformat(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return text
    return f"{created:%Y-%m-%d %H:%M:%S} UTC ({age(seconds_between(created, now))} ago)"


def _data(source: DataSource) -> str:
    if source.s3 is not None:
        return source.s3.uri
    if source.hugging_face is not None:
        return source.hugging_face.repo
    if source.volume is not None:
        return f"{source.volume.claim_name}:{source.volume.path}"
    mix = getattr(source, "mix", None) or []
    return " + ".join(_data(part) for part in mix)


def _usage(job: FineTuneJob) -> str:
    usage = status_of(job).usage
    if usage is None:
        return ""
    words = [f"{number(usage.gpu_seconds / 3600)} GPU hours"] if usage.gpu_seconds else []
    return ", ".join([*words, f"pods ran for {duration(usage.active_seconds)}"])


def _conditions(job: FineTuneJob, now: datetime) -> RenderableType:
    table = headed_table("conditions", "type", "status", "reason", "since", "")
    styles = {"True": "green", "False": "yellow"}
    for found in status_of(job).conditions:
        since = age(seconds_between(found.last_transition_time, now))
        style = styles.get(found.status, "")
        # Of these two conditions, False is the good one.
        if found.type in ("Stalled", "Reconciling"):
            style = "red" if (found.type, found.status) == ("Stalled", "True") else ""
        table.add_row("", found.type, Text(found.status, style=style), found.reason, since, Text(found.message))
    if not table.row_count:
        table.add_row("", "none yet", "", "", "", "")
    return table


def _preflight(job: FineTuneJob, now: datetime) -> RenderableType:
    preflight = status_of(job).preflight
    assert preflight is not None
    verdict = preflight.verdict or "has no result yet"
    words = f"{verdict} after {preflight.tries} tr{'y' if preflight.tries == 1 else 'ies'}"
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("check", style="dim"), words)
    if preflight.message:
        table.add_row("", Text(preflight.message))
    if preflight.next_try_time and (left := seconds_between(now, preflight.next_try_time)) > 0:
        table.add_row("", f"the next try is in {duration(left)}")
    if preflight.taken_over is not None:
        table.add_row("", Text(f"continues the run in the folder {preflight.taken_over.run_id}"))
    return table


def _causes(job: FineTuneJob) -> list[RenderableType]:
    """Return a line for each reason that ended an attempt: what the reason means, and what to do."""
    attempts = status_of(job).attempts
    reasons = [past.reason for past in attempts.recent]
    reasons += [attempts.current.cause.reason] if attempts.current is not None and attempts.current.cause else []
    free = f"{attempts.free} attempt{'s' if attempts.free != 1 else ''} ended freely"
    counted = f"{attempts.charged} of {job.spec.run_policy.max_retries} retries are used; {free}"
    lines: list[RenderableType] = [Text(f"  {counted}", style="dim")]
    for reason in dict.fromkeys(reasons):
        if reason in DISRUPTIONS:
            lines.append(Text(f"  {reason}: {DISRUPTIONS[reason]}", style="dim"))
        elif reason in set(Cause):
            found = CAUSES[Cause(reason)][1]
            todo = "" if found.advice == NOTHING else f" {found.advice}"
            lines.append(Text(f"  {reason}: {found.meaning}{todo}", style="dim"))
    return lines


def _pods(job: FineTuneJob) -> list[RenderableType]:
    current = status_of(job).attempts.current
    if current is None or not current.pods or ending(job) is not None:
        return []
    table = headed_table("pods", "index", "name", "node")
    for pod in current.pods:
        table.add_row("", str(pod.index), Text(pod.name, overflow="fold"), pod.node or "no node yet")
    return [Text(), table]


def _plan(plan: PlanStatus) -> RenderableType:
    engine = "without DeepSpeed" if plan.zero_stage is None else f"ZeRO stage {plan.zero_stage}"
    words = [
        f"{plan.processes} process{'es' if plan.processes > 1 else ''}, {engine}",
        f"{plan.micro_batch_size} example{'s' if plan.micro_batch_size > 1 else ''} at once,"
        f" {plan.gradient_accumulation_steps} times per step",
    ]
    words += [f"attention by {plan.attention}"] if plan.attention else []
    words += [f"adapters can change {number(plan.adapted_share)} of the layers' weights"] if plan.adapted_share else []
    needs = [
        ("a GPU needs", plan.gpu_memory_bytes),
        ("a pod needs", plan.memory_bytes),
    ]
    words += [f"{what} {size(needed)}" for what, needed in needs if needed is not None]
    words += [f"a pod needs {plan.cpus} CPUs"] if plan.cpus is not None else []
    table = Table.grid(padding=(0, 2))
    for index, line in enumerate(words):
        table.add_row(Text("plan" if index == 0 else "", style="dim"), Text(line))
    return table


def _events(events: Sequence[JobEvent] | str, now: datetime) -> list[RenderableType]:
    heading = Text("events", style="dim")
    if isinstance(events, str):
        return [heading, Text(f"  {events}")]
    if not events:
        return [heading, Text("  none: the API server keeps an event for an hour by default")]
    left_out = len(events) - EVENTS_SHOWN
    lines: list[RenderableType] = [heading, ColumnTable(EVENT_COLUMNS, event_rows(events[-EVENTS_SHOWN:], now))]
    if left_out > 0:
        lines.append(Text(f"  {left_out} older events: `finetune events` shows them"))
    return lines


def _bullet(text: str) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_row("  •", Text(text, overflow="fold"))
    return table
