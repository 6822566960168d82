"""The table of jobs that `finetune list` prints and `finetune watch` redraws: a pure function from jobs to cells.

A job that this version of the program can't read is a row too, so that it does not hide the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.text import Text

from finetune_cli.formatting import age, number, seconds_between, with_zone
from finetune_cli.state import blocking_message, ending, metric, state, state_message, status_of
from finetune_cli.views.columns import Column
from finetune_cli.views.panel import color_of
from finetune_core.api.job import FineTuneJob

UNREADABLE = "Unreadable"
"""State of a job that this version of the program can't read."""
NAMESPACE = Column("NAMESPACE")
COLUMNS = (
    Column("NAME"),
    Column("METHOD", spare=4),
    Column("STATE"),
    Column("STEP", right=True),
    Column("LOSS", right=True, spare=2),
    Column("PERPLEXITY", right=True, spare=5),
    Column("CHECKPOINT", right=True, spare=6),
    Column("LEFT", right=True, spare=1),
    Column("AGE", right=True, spare=3),
)
WIDE = (Column("ATTEMPTS", right=True), Column("MODEL"), Column("ARTIFACT"), Column("MESSAGE"))
MESSAGE = Column("MESSAGE", folds=True)


@dataclass(frozen=True, slots=True)
class Listed:
    """A job in a list: the job itself or, where this version can't read it, the reason."""

    namespace: str
    name: str
    stored: Mapping[str, Any]
    job: FineTuneJob | None
    problem: str = ""

    @property
    def order(self) -> tuple[bool, str, str]:
        """Sorts jobs that have not ended to the front, then by namespace and name."""
        return (self.job is not None and ending(self.job) is not None, self.namespace, self.name)


def job_columns(*, namespaces: bool, wide: bool, message: bool = False) -> list[Column]:
    """Return the columns of the table. ``message`` adds the sentence about each job, which the live table shows."""
    return [*([NAMESPACE] if namespaces else []), *COLUMNS, *(WIDE if wide else [MESSAGE] if message else [])]


def job_rows(
    jobs: Iterable[Listed], now: datetime, *, namespaces: bool, wide: bool, message: bool = False
) -> list[list[str | Text]]:
    """Return a row of cells for each of ``jobs``, for the columns of `job_columns`."""
    rows = []
    for listed in jobs:
        row: list[str | Text] = [listed.namespace] if namespaces else []
        row += _cells(listed, now)
        if wide:
            row += _wide_cells(listed)
        elif message:
            row.append(sentence(listed))
        rows.append(row)
    return rows


def _cells(listed: Listed, now: datetime) -> list[str | Text]:
    job = listed.job
    created = _age(listed.stored, now)
    if job is None:
        return [listed.name, "", Text(UNREADABLE, style="red"), "", "", "", "", "", created]
    status = status_of(job)
    progress = status.progress
    steps = f"{progress.step}/{progress.total_steps}" if progress and progress.total_steps else ""
    last = next((str(point.step) for point in reversed(status.checkpoints) if point.last), "")
    left = ""
    if progress and progress.eta_seconds is not None and ending(job) is None and state(job) == "Running":
        left = age(progress.eta_seconds)
    figures = [number(found.value) if (found := metric(job, name)) else "" for name in ("loss", "perplexity")]
    return [
        listed.name,
        str(job.spec.method),
        Text(state(job), style=color_of(job)),
        steps,
        *figures,
        last,
        left,
        created,
    ]


def _wide_cells(listed: Listed) -> list[str | Text]:
    if listed.job is None:
        return ["", "", "", sentence(listed)]
    status = status_of(listed.job)
    artifact = status.artifact.uri if status.artifact else ""
    return [str(status.attempts.started), model_of(listed.job), artifact, sentence(listed)]


def sentence(listed: Listed) -> str:
    """Return what the job does or waits for, or how it ended."""
    if listed.job is None:
        return listed.problem
    return blocking_message(listed.job) or state_message(listed.job)


def model_of(job: FineTuneJob) -> str:
    """Return the place of the base model, as `kubectl get ftj` shows it."""
    model = job.spec.model
    if model.hugging_face is not None:
        return model.hugging_face.repo
    if model.s3 is not None:
        return model.s3.uri
    return f"{model.volume.claim_name}:{model.volume.path}" if model.volume is not None else ""


def in_order(jobs: Sequence[Listed]) -> list[Listed]:
    """Return ``jobs``, those that have not ended first."""
    return sorted(jobs, key=lambda listed: listed.order)


def _age(stored: Mapping[str, Any], now: datetime) -> str:
    try:
        created = datetime.fromisoformat(str(stored["metadata"].get("creationTimestamp")))
    except ValueError:
        return ""
    return age(seconds_between(with_zone(created), now))
