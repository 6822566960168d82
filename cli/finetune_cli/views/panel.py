"""The panel that `finetune watch` shows on a terminal: a pure function from a FineTuneJob to a renderable of the
library rich.

`watch.py` calls `render` four times a second, so that the shown durations are current even while the job does not
change.
"""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli.formatting import duration, number, seconds_between
from finetune_cli.state import blocking_message, ending, risen_text, state, state_message, status_of, task_of
from finetune_cli.views.sections import (
    artifact_lines,
    attempt_table,
    checkpoint_table,
    curves,
    incident_table,
    needs_explanation,
    requirement_table,
    score_table,
    ungraded_lines,
)
from finetune_core.api.job import FineTuneJob

SILENCE_SECONDS = 30
"""Seconds without a report after which the panel shows the age of the last report. A running job reports every few
seconds."""


def render(job: FineTuneJob, now: datetime) -> RenderableType:
    """Return the panel about ``job``. ``now`` is the current time, with a time zone."""
    status = status_of(job)
    parts: list[RenderableType] = [state_line(job)]
    if status.progress and status.progress.total_steps:
        parts += [Text(), progress_line(job, now)]
    if (drawn := curves(job)) is not None:
        parts += [Text(), drawn]
    if status.checkpoints:
        parts += [Text(), checkpoint_table(status.checkpoints)]
    if status.evaluation:
        parts += [Text(), score_table(status.evaluation, task_of(job))]
        if meaning := risen_text(status.evaluation):
            parts.append(Text(f"  {meaning}", style="dim"))
        parts += ungraded_lines(status.evaluation)
        if status.evaluation.requirements:
            parts += [Text(), requirement_table(status.evaluation)]
    if status.incidents:
        parts += [Text(), incident_table(status.incidents)]
    if needs_explanation(status):
        parts += [Text(), attempt_table(status, now)]
    if status.artifact:
        parts += [Text(), artifact_lines(status.artifact)]
    return Panel(Group(*parts), title=_title(job), title_align="left", border_style=color_of(job), padding=(0, 1))


def _title(job: FineTuneJob) -> Text:
    resources = job.spec.resources
    machines = f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}"
    devices = "CPU" if resources.device == "CPU" else f"{resources.gpus_per_node} GPU each"
    about = f" · {job.metadata.namespace} · {job.spec.method} · {machines} · {devices}"
    return Text.assemble((job.metadata.name, "bold"), about)


def color_of(job: FineTuneJob) -> str:
    """Return the colour of the job's state."""
    end = ending(job)
    if end:
        return "green" if end.succeeded else "red"
    return {"Running": "cyan", "Retrying": "yellow"}.get(state(job), "bright_black")


def state_line(job: FineTuneJob) -> RenderableType:
    """Return the job's state with its message, and what stops the job from going on."""
    end = ending(job)
    mark = "●" if end is None else "✔" if end.succeeded else "✘"
    text = Text.assemble((f"{mark} {state(job)}", f"bold {color_of(job)}"), "  ", state_message(job))
    if blocking_message(job):
        text.append(f"\n  {blocking_message(job)}", style="yellow")
    return text


def progress_line(job: FineTuneJob, now: datetime) -> RenderableType:
    """Return a bar with the step, the speed and the remaining time. The job must have a progress."""
    status = status_of(job)
    progress = status.progress
    assert progress is not None
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=progress.total_steps, completed=progress.step, complete_style=color_of(job))
    words = [f"step {progress.step}/{progress.total_steps}", f"epoch {number(progress.epoch)}"]
    if ending(job) is None:
        words += _pace(job, now)
    elif status.start_time and status.completion_time:
        words.append(f"in {duration(seconds_between(status.start_time, status.completion_time))}")
    row.add_row(bar, "  ".join(words))
    return row


def _pace(job: FineTuneJob, now: datetime) -> list[str]:
    """Return speed and remaining time of an unfinished job as words. Where the last report is older than SILENCE,
    return only the time since that report."""
    progress = status_of(job).progress
    assert progress is not None
    silent = seconds_between(progress.last_update_time, now) if progress.last_update_time else 0.0
    if silent > SILENCE_SECONDS:
        return [f"last report {duration(silent)} ago"]
    words = []
    if progress.tokens_per_second is not None:
        words.append(f"{number(progress.tokens_per_second)} tokens/s")
    if progress.eta_seconds is not None:
        words.append(f"{duration(max(0.0, progress.eta_seconds - silent))} left")
    return words
