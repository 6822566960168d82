"""The panel that `finetune watch` shows on a terminal: a pure function from a FineTuneJob to a renderable of the
library rich.

`watch.py` calls `render` four times a second, so that the shown durations are current even while the job does not
change.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli.formatting import duration, number, size, sparkline
from finetune_cli.state import (
    blocking_message,
    ending,
    metric,
    required_text,
    risen_text,
    scores_by_name,
    state,
    state_message,
    status_of,
    task_of,
    ungraded_text,
)
from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import CheckpointStatus, EvaluationStatus, FineTuneJobStatus, IncidentStatus

CHECKPOINTS_SHOWN = 5
ATTEMPTS_SHOWN = 5
INCIDENTS_SHOWN = 5
SILENCE = timedelta(seconds=30)
"""Time without a report after which the panel shows the age of the last report. A running job reports every few
seconds."""


def render(job: FineTuneJob, now: datetime) -> RenderableType:
    """Return the panel about ``job``. ``now`` is the current time, with a time zone."""
    status = status_of(job)
    parts: list[RenderableType] = [_state(job)]
    if status.progress and status.progress.total_steps:
        parts += [Text(), _progress(job, now)]
    if curves := _curves(job):
        parts += [Text(), curves]
    if status.checkpoints:
        parts += [Text(), _checkpoints(status.checkpoints)]
    if status.evaluation:
        parts += [Text(), _evaluation(status.evaluation, task_of(job))]
        if meaning := risen_text(status.evaluation):
            parts.append(Text(f"  {meaning}", style="dim"))
        parts += _ungraded(status.evaluation)
        if status.evaluation.requirements:
            parts += [Text(), _requirements(status.evaluation)]
    if status.incidents:
        parts += [Text(), _incidents(status.incidents)]
    if attempts := _attempts(status, now):
        parts += [Text(), attempts]
    if status.artifact:
        parts += [Text(), _artifact(status)]
    return Panel(Group(*parts), title=_title(job), title_align="left", border_style=_color(job), padding=(0, 1))


def _title(job: FineTuneJob) -> Text:
    resources = job.spec.resources
    machines = f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}"
    devices = "CPU" if resources.device == "CPU" else f"{resources.gpus_per_node} GPU each"
    about = f" · {job.metadata.namespace} · {job.spec.method} · {machines} · {devices}"
    return Text.assemble((job.metadata.name, "bold"), about)


def _color(job: FineTuneJob) -> str:
    end = ending(job)
    if end:
        return "green" if end.succeeded else "red"
    return {"Running": "cyan", "Retrying": "yellow"}.get(state(job), "bright_black")


def _state(job: FineTuneJob) -> RenderableType:
    end = ending(job)
    mark = "●" if end is None else "✔" if end.succeeded else "✘"
    text = Text.assemble((f"{mark} {state(job)}", f"bold {_color(job)}"), "  ", state_message(job))
    if blocking_message(job):
        text.append(f"\n  {blocking_message(job)}", style="yellow")
    return text


def _progress(job: FineTuneJob, now: datetime) -> RenderableType:
    status = status_of(job)
    progress = status.progress
    assert progress is not None
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=progress.total_steps, completed=progress.step, complete_style=_color(job))
    words = [f"step {progress.step}/{progress.total_steps}", f"epoch {number(progress.epoch)}"]
    if ending(job) is None:
        words += _pace(job, now)
    elif status.start_time and status.completion_time:
        words.append(f"in {duration((status.completion_time - status.start_time).total_seconds())}")
    row.add_row(bar, "  ".join(words))
    return row


def _pace(job: FineTuneJob, now: datetime) -> list[str]:
    """Return speed and remaining time of an unfinished job as words. Where the last report is older than SILENCE,
    return only the time since that report."""
    progress = status_of(job).progress
    assert progress is not None
    silent = now - progress.last_update_time if progress.last_update_time else timedelta()
    if silent > SILENCE:
        return [f"last report {duration(silent.total_seconds())} ago"]
    words = []
    if progress.tokens_per_second is not None:
        words.append(f"{number(progress.tokens_per_second)} tokens/s")
    if progress.eta_seconds is not None:
        words.append(f"{duration(max(0.0, progress.eta_seconds - silent.total_seconds()))} left")
    return words


def _curves(job: FineTuneJob) -> RenderableType | None:
    """Return a table with a row for the loss and a row for the validation perplexity, each only where the job has a
    value. A row has the newest value, the curve and the first value. Return None where the job has neither value."""
    history = status_of(job).history
    table = Table.grid(padding=(0, 2))
    for label, name, values in (
        ("loss", "loss", [float(point.loss) for point in history if point.loss is not None]),
        ("validation perplexity", "perplexity", [float(p.perplexity) for p in history if p.perplexity is not None]),
    ):
        newest = metric(job, name)
        if newest is None and not values:
            continue
        value = number(newest.value) if newest else number(values[-1])
        start = f"from {number(values[0])}" if len(values) > 1 else ""
        table.add_row(Text(label, style="dim"), value, Text(sparkline(values), style="cyan"), Text(start, style="dim"))
    return table if table.row_count else None


def _checkpoints(checkpoints: list[CheckpointStatus]) -> RenderableType:
    table = _table("checkpoints", "step", "size", "perplexity", "")
    shown = checkpoints[-CHECKPOINTS_SHOWN:]
    shown = [point for point in checkpoints if point.best and point not in shown] + shown
    for point in shown:
        marks = Text(" ".join(word for word, holds in (("best", point.best), ("last", point.last)) if holds), "bold")
        if point.damaged:
            marks = Text(f"damaged: {point.damaged}", style="red")
        table.add_row("", str(point.step), size(point.bytes), _or_dash(point.perplexity), marks)
    return table


def _evaluation(evaluation: EvaluationStatus, task: str | None) -> RenderableType:
    """Return a table with one row for each score, and with columns for the base model and the tuned model."""
    of_step = f"step {evaluation.tuned_step}" if evaluation.tuned_step is not None else "tuned"
    table = _table("scores", f"{evaluation.examples} {evaluation.rows.lower()} examples", "base", of_step)
    for column in (2, 3):
        table.columns[column].justify = "right"
    base, tuned = scores_by_name(evaluation.base, task), scores_by_name(evaluation.tuned, task)
    for name in {**base, **tuned}:
        table.add_row("", name, _or_dash(base.get(name)), Text(_or_dash(tuned.get(name)), style="bold"))
    return table


def _ungraded(evaluation: EvaluationStatus) -> list[RenderableType]:
    """Return a line about the base model and a line about the tuned model, each only where some answers of that model
    could not be graded."""
    models = (("base", evaluation.base), ("tuned", evaluation.tuned))
    texts = [(name, ungraded_text(scores)) for name, scores in models]
    return [Text(f"  {name} model: {text}", style="yellow") for name, text in texts if text]


def _requirements(evaluation: EvaluationStatus) -> RenderableType:
    """Return a table with one row for each required score: what is required, the scores of base model and tuned
    model, their difference and the verdict."""
    table = _table("required", "score", "", "base", "tuned", "difference", "")
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for found in evaluation.requirements:
        verdict = Text("passed", style="green") if found.passed else Text("failed", style="bold red")
        # All digits are shown, because a rounded score may look like its bound.
        figures = (value or "–" for value in (found.base, found.tuned, found.difference))
        table.add_row("", found.score, required_text(found), *figures, verdict)
    return table


def _incidents(incidents: list[IncidentStatus]) -> RenderableType:
    table = _table("incidents", "step", "what", "done", "")
    for incident in incidents[-INCIDENTS_SHOWN:]:
        what = Text(f"{incident.kind} ({incident.value}, threshold {incident.threshold})", style="yellow")
        table.add_row("", str(incident.step), what, incident.action, Text(incident.message))
    return table


def _or_dash(value: str | None) -> str:
    return number(value) if value is not None else "–"


def _attempts(status: FineTuneJobStatus, now: datetime) -> RenderableType | None:
    """Return a table of the attempts: how the newest ended attempts ended, the current attempt, and when the next
    attempt starts. Return None where there is nothing to explain: every ended attempt has succeeded, and the status
    names no cause for an end of the current attempt."""
    attempts = status.attempts
    current = attempts.current
    ended_well = all(past.verdict == "Succeeded" for past in attempts.recent)
    if ended_well and (current is None or current.cause is None):
        return None
    table = _table("attempts", "no.", "ended as", "after", "")
    for past in attempts.recent[-ATTEMPTS_SHOWN:]:
        took = duration((past.end_time - past.start_time).total_seconds())
        verdict = f"{past.reason} ({past.verdict.lower()})" if past.verdict != "Succeeded" else past.reason
        table.add_row("", str(past.number), verdict, took, Text(past.message))
    if current is not None:
        since = duration((now - current.start_time).total_seconds())
        word, message = (current.cause.reason, current.cause.message) if current.cause else ("runs", "")
        table.add_row("", str(current.number), word, since, Text(message))
    if attempts.next_start_time and attempts.next_start_time > now:
        wait = duration((attempts.next_start_time - now).total_seconds())
        table.add_row("", str(attempts.started + 1), f"starts in {wait}", "", "")
    return table


def _artifact(status: FineTuneJobStatus) -> RenderableType:
    artifact = status.artifact
    assert artifact is not None
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("artifact", style="dim"), f"step {artifact.step}, {size(artifact.bytes)}")
    table.add_row("", Text(artifact.uri, overflow="fold"))
    return table


def _table(title: str, *columns: str) -> Table:
    """Return an empty table without borders. ``title`` is the heading of the first column. Callers leave the cells of
    this column empty, so that the heading serves as the name of the table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column(title)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("step", "size", "perplexity", "no.", "after") else "left"
        )
    return table
