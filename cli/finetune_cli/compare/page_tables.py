"""Makes the tables of the page: the runs with their figures, the scores, and what happened to the training. Pure;
`page.py` puts them into the template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_cli.compare.answers import Answer
from finetune_cli.compare.claims.findings import Comparison, FiguredRun, percent, points
from finetune_cli.compare.figures import difference_between, gain_of, main_score, score_interval, scored_rows
from finetune_cli.compare.stored_files import ModelScores
from finetune_cli.formatting import count, duration, number, size
from finetune_core.task_declaration import Task, Unit

NONE = "–"
"""What a cell shows where a value is not known."""


class Kind(StrEnum):
    """What the cells of a column hold. The values are CSS classes of the page."""

    NUMBER = "number"
    WORD = "word"
    SENTENCE = "sentence"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table with one row for each run."""

    heading: str
    meaning: str
    cell: Callable[[FiguredRun], str]
    kind: Kind = Kind.NUMBER


def number_or_none(value: float | None) -> str:
    """Return ``value`` for people."""
    return NONE if value is None else number(value)


def size_or_none(value: int | None) -> str:
    """Return ``value``, a number of bytes, for people."""
    return NONE if value is None else size(value)


def main_score_text(item: FiguredRun, model: ModelScores | None) -> str:
    """Return the main score of ``model`` for people."""
    value = main_score(item.run, model)
    if value is None:
        return NONE
    return percent(value) if item.run.task is not None and 0 <= value <= 1 else number(value)


def _method(item: FiguredRun) -> str:
    if item.run.tuning is None:
        return "not known"
    rank = item.run.setting("lora.rank")
    return f"{item.run.tuning} r {rank}" if rank is not None else str(item.run.tuning)


def _state(item: FiguredRun) -> str:
    if item.run.job is not None:
        return item.run.job.state
    return "has an artifact" if item.run.artifact is not None else "no artifact yet"


def _best_perplexity(item: FiguredRun) -> str:
    best = item.figures.best_perplexity
    return NONE if best is None else f"{number(best)} at {item.figures.best_step:,}"


def _tuned_score(item: FiguredRun) -> str:
    return main_score_text(item, item.run.scores.tuned if item.run.scores is not None else None)


def _tokens_per_second(item: FiguredRun) -> str:
    speed = item.figures.tokens_per_second
    return NONE if speed is None else f"{speed:,.0f}" if speed >= 100 else number(speed)


def _processes(item: FiguredRun) -> str:
    device = {True: " GPU", False: " CPU", None: ""}[item.run.on_gpu]
    return NONE if item.run.processes is None else f"{item.run.processes}{device}"


def _gpu_hours(item: FiguredRun) -> str:
    figures = item.figures
    if figures.gpu_hours is None:
        return NONE
    source = "operator" if figures.counted_by_operator else "steps"
    kind = "CPU processes, " if item.run.on_gpu is False else ""
    return f"{number(figures.gpu_hours)} ({kind}{source})"


OVERVIEW: Sequence[Column] = (
    Column("method", "What was trained: adapters or every parameter", _method, Kind.WORD),
    Column("task", "What grades the answers", lambda item: item.run.task_name or NONE, Kind.WORD),
    Column("steps", "Optimizer steps", lambda item: f"{item.figures.steps:,}"),
    Column("tokens", "Tokens of prompts and answers, without padding", lambda item: count(item.figures.tokens)),
    Column(
        "loss",
        "Mean training loss of the last steps, in nats per supervised token",
        lambda item: number_or_none(item.figures.last_loss),
    ),
    Column("best perplexity", "Least validation perplexity, and its step", _best_perplexity),
    Column("main score", "Main score of the tuned model", _tuned_score),
    Column(
        "stability",
        "Rollbacks, steps that were not finite, and a loss that exploded",
        lambda item: item.stability,
        Kind.SENTENCE,
    ),
    Column("state", "State of the job in the cluster, or what its folder says", _state, Kind.WORD),
)
"""The columns of the first table: what was trained, and how well."""

SPEED: Sequence[Column] = (
    Column("tokens per second", "Tokens without padding, over all processes", _tokens_per_second),
    Column(
        "MFU",
        "Model FLOPs utilisation, which is measured on GPUs only",
        lambda item: NONE if item.figures.mfu is None else f"{item.figures.mfu:.1%}",
    ),
    Column(
        "peak memory",
        "Memory of rank 0 at its peak: of the GPU, or of the process on a CPU",
        lambda item: size_or_none(item.figures.memory_bytes),
    ),
    Column("checkpoint", "Size of the newest checkpoint", lambda item: size_or_none(item.run.checkpoint_bytes)),
    Column(
        "artifact",
        "Size of the adapter or the model",
        lambda item: size_or_none(item.run.artifact.bytes if item.run.artifact is not None else None),
    ),
    Column(
        "training time",
        "Time of the steps that led to the model, with the time that training waited for checkpoints",
        lambda item: duration(3600 * item.figures.hours),
    ),
    Column(
        "discarded steps",
        "Steps that a rollback or a restart left behind",
        lambda item: f"{item.figures.discarded_steps:,}",
    ),
    Column("processes", "Training processes, one for each GPU", _processes),
    Column("GPU hours", "Counted by the operator, or else those of the steps in the log", _gpu_hours),
)
"""The columns of the table of speed, memory, sizes and time."""


def cost_column(price: float) -> Column:
    """Return the column of costs. ``price`` is that of one GPU for one hour."""
    return Column(
        "cost",
        f"GPU hours times {price:g}",
        lambda item: NONE if item.figures.cost is None else f"{item.figures.cost:,.2f}",
    )


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A row of the table of scores: one score of one run, for the base model and for the tuned model."""

    index: int
    label: str
    task: str
    score: str
    rows: str
    base: str
    tuned: str
    is_shown_first: bool = True
    """Whether the score is the task's main score or a perplexity. The other scores stand in a table of their own."""
    gain: str = NONE
    """What the tuned model has gained, with its interval; only for the main score."""
    against_first: str = NONE
    """How much better the tuned model is than that of the first run; only for the main score, and where the task is the
    same."""


def score_rows(comparison: Comparison) -> list[ScoreRow]:
    """Return the rows of the table of scores. Of each run come the main score, the other scores and the
    perplexities."""
    first = comparison.runs[0]
    return [row for index, item in enumerate(comparison.runs) for row in _score_rows(index, item, first)]


def _score_rows(index: int, item: FiguredRun, first: FiguredRun) -> list[ScoreRow]:
    run, scores = item.run, item.run.scores
    if scores is None:
        return []
    tuned, base = scores.tuned, scores.base
    names = list(dict.fromkeys([*(tuned.scores if tuned else ()), *(base.scores if base else ())]))
    main = run.task.main if run.task is not None else None
    names.sort(key=lambda name: name != main)
    gain, against = gain_of(run), difference_between(first.run, run) if item is not first else None
    found = []
    for name in names:
        is_main = name == main or (main is None and len(names) == 1)
        found.append(
            ScoreRow(
                index,
                item.label,
                run.task_name or "own or unknown",
                name,
                _graded(tuned or base),
                _valued(item, name, base),
                _valued(item, name, tuned),
                is_main,
                points(gain) if is_main and gain is not None else NONE,
                points(against) if is_main and against is not None else NONE,
            )
        )
    perplexities = {
        "perplexity": [model.perplexity if model is not None else None for model in (base, tuned)],
        "perplexity of all tokens": [
            model.all_token_perplexity if model is not None else None for model in (base, tuned)
        ],
    }
    for name, (before, after) in perplexities.items():
        if before is not None or after is not None:
            values = (number_or_none(before), number_or_none(after))
            found.append(ScoreRow(index, item.label, run.task_name or NONE, name, scored_rows(scores), *values))
    return found


def _graded(model: ModelScores | None) -> str:
    if model is None:
        return NONE
    left_out = f", {model.not_graded} not graded" if model.not_graded else ""
    return f"{model.graded} answers{left_out}"


def _valued(item: FiguredRun, name: str, model: ModelScores | None) -> str:
    """Return the value of a score with its interval."""
    value = model.scores.get(name) if model is not None else None
    if model is None or value is None:
        return NONE
    interval = score_interval(item.run.task, name, value, model.graded)
    if interval is None:
        return number(value)
    return f"{percent(value)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def events_of(item: FiguredRun) -> list[str]:
    """Return sentences about what happened to the training of a run: rollbacks, incidents, restarts, lost steps."""
    training = item.run.training
    events = [
        f"Rollback to step {rollback.step}: {rollback.reason or 'no reason given'}. The rate was multiplied by"
        f" {rollback.rate_factor:g}, and the batches of steps {rollback.skip_from} to {rollback.skip_to} were left out."
        for rollback in training.rollbacks
    ]
    if item.run.job is not None:
        events += item.run.job.incidents
    if training.restarts:
        events.append(f"The ranks started again {training.restarts} time{'s' if training.restarts > 1 else ''}.")
    if training.discarded:
        events.append(f"Computed steps that were left behind: {len(training.discarded):,}.")
    if (explosion := item.figures.explosion) is not None:
        events.append(
            f"The training loss rose from {explosion.before:.4g} to {explosion.level:.4g} (medians) at step"
            f" {explosion.step}."
        )
    if item.figures.not_finite:
        events.append(f"Steps whose loss or gradient was not finite: {item.figures.not_finite:,}.")
    return events


def answers_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows with answers of each run that has any, for the template."""
    return [
        {
            "index": index,
            "label": item.run.label,
            "entries": [
                {
                    "columns": row.columns,
                    "answers": [None if answer is None else _answer(answer, item.run.task) for answer in answers],
                }
                for row in item.run.scores.answers
                for answers in [(row.base, row.tuned)]
            ],
        }
        for index, item in enumerate(comparison.runs)
        if item.run.scores is not None and item.run.scores.answers
    ]


def _answer(answer: Answer, task: Task | None) -> dict[str, str]:
    """Return an answer and its grades as texts."""
    graded = {score.name for score in task.scores if score.unit is Unit.RIGHT_OR_WRONG} if task is not None else set()
    grades = [
        f"{name}: {'right' if value else 'wrong'}" if name in graded else f"{name}: {number(value)}"
        for name, value in answer.scores.items()
    ]
    return {"text": answer.text, "grades": ", ".join([*grades, answer.problem] if answer.problem else grades)}
