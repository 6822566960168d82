"""The parts of which the panel of `finetune watch` and the page of `finetune describe` consist: one function for each
section of a job's status, from the section to a renderable of the library rich. All functions are pure.
"""

from __future__ import annotations

from datetime import datetime

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune_cli.formatting import duration, measured, number, seconds_between, size, sparkline
from finetune_cli.state import metric, required_text, scores_by_name, status_of, ungraded_text
from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import (
    ArtifactStatus,
    CheckpointStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    IncidentStatus,
)

CHECKPOINTS_SHOWN = 5
ATTEMPTS_SHOWN = 5
INCIDENTS_SHOWN = 5


def curves(job: FineTuneJob) -> RenderableType | None:
    """Return a table with a row for the loss and a row for the validation perplexity, each only where the job has a
    value. A row has the newest value, the curve and the first value. Return None where the job has neither value."""
    history = status_of(job).history
    table = Table.grid(padding=(0, 2))
    for label, name, values in (
        ("loss", "loss", [value for point in history if (value := measured(point.loss)) is not None]),
        (
            "validation perplexity",
            "perplexity",
            [value for point in history if (value := measured(point.perplexity)) is not None],
        ),
    ):
        newest = metric(job, name)
        if newest is None and not values:
            continue
        shown = number(newest.value) if newest else number(values[-1])
        start = f"from {number(values[0])}" if len(values) > 1 else ""
        table.add_row(Text(label, style="dim"), shown, Text(sparkline(values), style="cyan"), Text(start, style="dim"))
    return table if table.row_count else None


def checkpoint_table(checkpoints: list[CheckpointStatus]) -> RenderableType:
    """Return a table of the newest checkpoints, and of the best one."""
    table = headed_table("checkpoints", "step", "size", "perplexity", "")
    shown = checkpoints[-CHECKPOINTS_SHOWN:]
    shown = [point for point in checkpoints if point.best and point not in shown] + shown
    for point in shown:
        marks = Text(" ".join(word for word, holds in (("best", point.best), ("last", point.last)) if holds), "bold")
        if point.damaged:
            marks = Text(f"damaged: {point.damaged}", style="red")
        table.add_row("", str(point.step), size(point.bytes), _or_dash(point.perplexity), marks)
    return table


def score_table(evaluation: EvaluationStatus, task: str | None) -> RenderableType:
    """Return a table with one row for each score, and with columns for the base model and the tuned model."""
    of_step = f"step {evaluation.tuned_step}" if evaluation.tuned_step is not None else "tuned"
    table = headed_table("scores", f"{evaluation.examples} {evaluation.rows.lower()} examples", "base", of_step)
    for column in (2, 3):
        table.columns[column].justify = "right"
    base, tuned = scores_by_name(evaluation.base, task), scores_by_name(evaluation.tuned, task)
    for name in {**base, **tuned}:
        table.add_row("", name, _or_dash(base.get(name)), Text(_or_dash(tuned.get(name)), style="bold"))
    return table


def ungraded_lines(evaluation: EvaluationStatus) -> list[RenderableType]:
    """Return a line about the base model and a line about the tuned model, each only where some answers of that model
    could not be graded."""
    models = (("base", evaluation.base), ("tuned", evaluation.tuned))
    texts = [(name, ungraded_text(scores)) for name, scores in models]
    return [Text(f"  {name} model: {text}", style="yellow") for name, text in texts if text]


def requirement_table(evaluation: EvaluationStatus) -> RenderableType:
    """Return a table with one row for each required score: what is required, the scores of base model and tuned
    model, their difference and the verdict."""
    table = headed_table("required", "score", "", "base", "tuned", "difference", "")
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for found in evaluation.requirements:
        verdict = Text("passed", style="green") if found.passed else Text("failed", style="bold red")
        # All digits are shown, because a rounded score may look like its bound.
        figures = (value or "–" for value in (found.base, found.tuned, found.difference))
        table.add_row("", found.score, required_text(found), *figures, verdict)
    return table


def incident_table(incidents: list[IncidentStatus]) -> RenderableType:
    """Return a table of the newest incidents, and what was done about each."""
    table = headed_table("incidents", "step", "what", "done", "")
    for incident in incidents[-INCIDENTS_SHOWN:]:
        what = Text(f"{incident.kind} ({incident.value}, threshold {incident.threshold})", style="yellow")
        table.add_row("", str(incident.step), what, incident.action, Text(incident.message))
    return table


def _or_dash(value: str | None) -> str:
    return number(value) if value is not None else "–"


def needs_explanation(status: FineTuneJobStatus) -> bool:
    """Return whether an attempt ended badly, or the current attempt is about to end."""
    attempts = status.attempts
    ended_well = all(past.verdict == "Succeeded" for past in attempts.recent)
    return not ended_well or (attempts.current is not None and attempts.current.cause is not None)


def attempt_table(status: FineTuneJobStatus, now: datetime, *, everything: bool = False) -> RenderableType:
    """Return a table of the attempts: how the newest ended attempts ended, the current attempt, and when the next
    attempt starts. With ``everything`` the table has all attempts of the status, and the nodes that ended them."""
    attempts = status.attempts
    current = attempts.current
    table = headed_table("attempts", "no.", "ended as", "after", "")
    for past in attempts.recent if everything else attempts.recent[-ATTEMPTS_SHOWN:]:
        took = duration(seconds_between(past.start_time, past.end_time))
        verdict = f"{past.reason} ({past.verdict.lower()})" if past.verdict != "Succeeded" else past.reason
        place = f"node {past.node}: " if everything and past.node else ""
        table.add_row("", str(past.number), verdict, took, Text(f"{place}{past.message}"))
    if current is not None:
        since = duration(seconds_between(current.start_time, now))
        word, message = (current.cause.reason, current.cause.message) if current.cause else ("runs", "")
        table.add_row("", str(current.number), word, since, Text(message))
    if attempts.next_start_time and (left := seconds_between(now, attempts.next_start_time)) > 0:
        wait = duration(left)
        table.add_row("", str(attempts.started + 1), f"starts in {wait}", "", "")
    return table


def artifact_lines(artifact: ArtifactStatus) -> RenderableType:
    """Return step, size and address of the artifact."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("artifact", style="dim"), f"step {artifact.step}, {size(artifact.bytes)}")
    table.add_row("", Text(artifact.uri, overflow="fold"))
    return table


def headed_table(title: str, *columns: str) -> Table:
    """Return an empty table without borders. ``title`` is the heading of the first column. Callers leave the cells of
    this column empty, so that the heading serves as the name of the table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column(title)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("step", "size", "perplexity", "no.", "after") else "left"
        )
    return table
