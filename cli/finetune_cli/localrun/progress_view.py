"""What `finetune run` shows of a training: pure functions from a report to a line for a pipe, or to what a terminal
shows.

`run_job.py` calls them with the newest report of rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli.formatting import duration, number, size
from finetune_core.contract import EvaluationRecord, Phase, Report, Result
from finetune_core.tasks import main_score_text

LINES = 20
"""About how many lines a whole training writes into a pipe, unless the user says how many steps lie between two."""
_DOING = {
    Phase.LOADING: "loading the model",
    Phase.TRAINING: "training",
    Phase.EVALUATING: "evaluating",
    Phase.GENERATING: "generating answers",
    Phase.SAVING: "saving a checkpoint",
    Phase.EXPORTING: "exporting the model",
    Phase.ENDED: "ended",
}


def figures(report: Report) -> str:
    """Return the newest loss, perplexity, speed and time left of ``report``, as far as they are known."""
    known = []
    for name in ("loss", "perplexity"):
        if name in report.metrics:
            known.append(f"{name} {number(report.metrics[name])}")
    if report.tokens_per_second is not None:
        known.append(f"{number(report.tokens_per_second)} tokens/s")
    if report.eta_seconds is not None and report.phase is not Phase.ENDED and report.step < report.total_steps:
        known.append(f"{duration(report.eta_seconds)} left")
    return "  ".join(known)


def line(report: Report) -> str:
    """Return the line about a step for a pipe."""
    return f"step {report.step}/{report.total_steps}  {figures(report)}".rstrip()


def is_due(report: Report, shown: int | None, every: int | None) -> bool:
    """Return whether a line about the step of ``report`` is due. ``shown`` is the step of the newest line, None before
    the first one, and ``every`` the number of steps between two lines, None for about LINES lines in all."""
    if report.step == 0 or report.step == shown:
        return False
    between = every or max(1, report.total_steps // LINES)
    return shown is None or report.step == report.total_steps or report.step // between > shown // between


def live_view(report: Report | None, doing: str, elapsed: float) -> RenderableType:
    """Return what a terminal shows while a training runs. ``report`` is None before the first one. ``doing`` takes the
    place of the phase where it is not empty, and ``elapsed`` is the time since the start in seconds."""
    phase = doing or (_DOING[report.phase] if report is not None else "starting")
    state = Text.assemble(("● ", "cyan"), (phase, "bold"), f"  {duration(elapsed)}")
    if report is None or not report.total_steps:
        return state
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=report.total_steps, completed=report.step, complete_style="cyan")
    row.add_row(bar, f"step {report.step}/{report.total_steps}")
    return Group(state, row, Text(f"  {figures(report)}"))


def new_notices(report: Report, told: Sequence[str]) -> list[str]:
    """Return the notices of ``report`` that are not among those ``told``."""
    return [notice for notice in report.notices if notice not in told]


def scores(evaluation: EvaluationRecord, task: str | None) -> list[str]:
    """Return a line for the base model and one for the tuned model, as far as they were scored. ``task`` is the name of
    the task, None without one."""
    found = []
    for name, record in (("base", evaluation.base), ("tuned", evaluation.tuned)):
        if record is None:
            continue
        text = f"{name} model: perplexity {number(record.perplexity)}"
        if record.task_score is not None:
            text += f", {main_score_text(task, record.task_score, answers=record.graded)}"
        found.append(f"{text} on {evaluation.examples} {evaluation.rows.lower()} examples")
    return found


def ending(result: Result) -> str:
    """Return the line about how a training ended."""
    text = f"{result.outcome.value}: {result.message}" if result.message else result.outcome.value
    if result.artifact is None:
        return text
    return f"{text}  ({size(result.artifact.bytes)}, step {result.artifact.step})"
