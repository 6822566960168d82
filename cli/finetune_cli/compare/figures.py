"""Computes the figures of a run: loss, perplexity, stability, speed, memory, time and cost. Pure; the views and the
claims read them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from finetune_cli.compare.compared_run import ComparedRun, Scores, Tuning
from finetune_cli.compare.intervals import Difference, Interval, paired_difference, unpaired_difference, wilson
from finetune_cli.compare.stored_files import ModelScores, Step
from finetune_core.task_declaration import Aggregation, Task, Unit

LAST_SHARE = 10
"""The last loss of a run is the mean over the last tenth of its steps, and over at most MOST_LAST_STEPS."""
MOST_LAST_STEPS = 50
RECENT, BASELINE = 8, 32
"""Steps whose median loss is compared with the lowest median of the steps before them. The trainer's stability monitor
(`decisions/stability.py`) looks at as many."""
EXPLODED_FACTOR, EXPLODED_NATS = 2.0, 0.1
"""The loss has exploded where the recent median is at least EXPLODED_FACTOR times the lowest median before, and
EXPLODED_NATS above it. A run whose loss is almost 0 doubles it easily, which is no explosion."""
STRIDE = 4
"""Medians are computed at every fourth step, which misses no explosion of RECENT steps."""
MEAN_TOLERANCE = 1e-4
"""A score counts as the mean of stored grades where both differ by at most this."""
FEWEST_SHARED, SHARED_SHARE = 2, 0.9
"""Two models are compared row by row where both were graded on at least SHARED_SHARE of the rows of each, and on at
least FEWEST_SHARED rows. With fewer shared rows, the difference would be that of other rows than the scores."""


@dataclass(frozen=True, slots=True)
class Explosion:
    """The largest rise of the training loss over its lowest level before."""

    step: int
    level: float
    """Median loss of the steps around ``step``."""
    before: float
    """Lowest median loss before."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run. None where the folder does not say."""

    steps: int
    tokens: int
    last_loss: float | None
    best_perplexity: float | None
    best_step: int | None
    last_perplexity: float | None
    hours: float
    """Hours of the steps that led to the model, with the time that training waited for checkpoints."""
    tokens_per_second: float | None
    mfu: float | None
    memory_bytes: int | None
    discarded_steps: int
    gpu_hours: float | None
    counted_by_operator: bool
    """Whether `gpu_hours` are the operator's count of the time that pods held GPUs. Otherwise they are those of the
    steps in the log, and loading, evaluation and export are not included."""
    cost: float | None
    explosion: Explosion | None
    not_finite: int


def figures_of(run: ComparedRun, price: float | None) -> Figures:
    """Return the figures of ``run``. ``price`` is that of one GPU (of one process on the CPU) for one hour."""
    training = run.training
    steps = [step for step in training.steps if step.is_trained]
    scored = [step for step in training.steps if step.perplexity is not None]
    best = min(scored, key=lambda step: step.perplexity or math.inf, default=None)
    every = [*training.steps, *training.discarded]
    peak = max((step.memory_peak_bytes for step in every), default=0)
    utilised = [step.mfu for step in training.steps if step.mfu is not None]
    counted = run.job.gpu_seconds if run.job is not None and run.on_gpu is not False else None
    hours: float | None = None
    if counted:
        hours = counted / 3600
    elif run.processes is not None and every:
        hours = sum(step.seconds + step.checkpoint_seconds for step in every) * run.processes / 3600
    return Figures(
        steps=training.steps[-1].step if training.steps else 0,
        tokens=sum(step.all_tokens for step in steps),
        last_loss=_last_loss(steps),
        best_perplexity=best.perplexity if best is not None else None,
        best_step=best.step if best is not None else None,
        last_perplexity=scored[-1].perplexity if scored else None,
        hours=sum(step.seconds + step.checkpoint_seconds for step in training.steps) / 3600,
        tokens_per_second=_tokens_per_second(steps),
        mfu=fmean(utilised) if utilised else None,
        memory_bytes=peak or None,
        discarded_steps=len(training.discarded),
        gpu_hours=hours,
        counted_by_operator=bool(counted),
        cost=hours * price if hours is not None and price is not None else None,
        explosion=explosion_of(steps),
        not_finite=len(training.not_finite),
    )


def is_unstable(run: ComparedRun, figures: Figures) -> bool:
    """Return whether the training of ``run`` was unstable: a loss or gradient that was not finite, a rollback, or a
    loss that exploded."""
    return bool(figures.not_finite or run.training.rollbacks or figures.explosion)


def explosion_of(steps: Sequence[Step]) -> Explosion | None:
    """Return the largest rise of the loss in ``steps`` that counts as an explosion, or None. Fewer than BASELINE +
    RECENT steps never have one."""
    losses = [(step.step, step.loss) for step in steps if step.loss is not None]
    lowest, worst = math.inf, None
    for end in range(BASELINE + RECENT, len(losses) + 1, STRIDE):
        before = [loss for _, loss in losses[end - RECENT - BASELINE : end - RECENT]]
        recent = [loss for _, loss in losses[end - RECENT : end]]
        lowest, level = min(lowest, median(before)), median(recent)
        if (
            level >= lowest * EXPLODED_FACTOR
            and level - lowest >= EXPLODED_NATS
            and (worst is None or level > worst.level)
        ):
            worst = Explosion(losses[end - 1][0], level, lowest)
    return worst


def _last_loss(steps: Sequence[Step]) -> float | None:
    losses = [step.loss for step in steps if step.loss is not None]
    count = min(MOST_LAST_STEPS, max(1, len(losses) // LAST_SHARE))
    return fmean(losses[-count:]) if losses else None


def _tokens_per_second(steps: Sequence[Step]) -> float | None:
    """Return tokens without padding per second over all processes. The first step of each run is left out, because it
    prepares the device, unless there are no other steps."""
    starts = {run: min(step.step for step in steps if step.run == run) for run in {step.run for step in steps}}
    later = [step for step in steps if step.step != starts[step.run]] or list(steps)
    seconds = sum(step.seconds for step in later)
    return sum(step.all_tokens for step in later) / seconds if seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Point:
    """One step on the three axes of the curves."""

    step: int
    tokens: int
    """Tokens of prompts and answers that were trained on so far, without padding."""
    hours: float
    """Hours of training so far, with the time that training waited for checkpoints."""
    row: Step


def points_of(run: ComparedRun) -> Iterator[Point]:
    """Yield the steps of ``run`` with the tokens and the time until their end."""
    tokens, seconds = 0, 0.0
    for step in run.training.steps:
        tokens += step.all_tokens if step.is_trained else 0
        seconds += step.seconds + step.checkpoint_seconds
        yield Point(step.step, tokens, seconds / 3600, step)


def main_score(run: ComparedRun, model: ModelScores | None) -> float | None:
    """Return the main score of the run's task for ``model``, None where it was not graded."""
    if model is None:
        return None
    return model.scores.get(run.task.main, model.task_score) if run.task is not None else model.task_score


def score_interval(task: Task | None, name: str, value: float, graded: int) -> Interval | None:
    """Return the interval of the score ``name``, or None where there is none: no answer was graded, the score is no
    mean of values from 0 to 1, or the task is not known and the value is out of that range."""
    if graded < 1 or not 0 <= value <= 1:
        return None
    declared = next((score for score in task.scores if score.name == name), None) if task is not None else None
    if declared is not None and (declared.unit is Unit.VALUE or declared.aggregation is not Aggregation.MEAN):
        return None
    return wilson(value, graded)


def gain_of(run: ComparedRun) -> Difference | None:
    """Return how much higher the main score of the tuned model is than that of the base model, with its interval. None
    where one of both was not graded, and for a score without an interval."""
    scores = run.scores
    if scores is None or scores.base is None or scores.tuned is None:
        return None
    return _difference(run, scores.base, scores.base_grades, run, scores.tuned, scores.tuned_grades)


def difference_between(first: ComparedRun, second: ComparedRun) -> Difference | None:
    """Return how much higher the main score of the second run's tuned model is, with its interval. None where one of
    both was not graded, where the tasks differ, and for a score without an interval."""
    a, b = first.scores, second.scores
    if a is None or b is None or a.tuned is None or b.tuned is None or first.task_name != second.task_name:
        return None
    return _difference(first, a.tuned, a.tuned_grades, second, b.tuned, b.tuned_grades)


def _difference(
    first_run: ComparedRun,
    first: ModelScores,
    first_grades: Mapping[str, float],
    second_run: ComparedRun,
    second: ModelScores,
    second_grades: Mapping[str, float],
) -> Difference | None:
    a, b = main_score(first_run, first), main_score(second_run, second)
    if a is None or b is None:
        return None
    shared = sorted(first_grades.keys() & second_grades.keys())
    # The score of an own grader may be a median, whose difference is not the mean of the rows' differences.
    are_means = _is_mean(a, first_grades) and _is_mean(b, second_grades)
    if are_means and len(shared) >= max(FEWEST_SHARED, SHARED_SHARE * max(first.graded, second.graded)):
        found = paired_difference([first_grades[row] for row in shared], [second_grades[row] for row in shared])
        if found is not None:
            return found
    name = first_run.task.main if first_run.task is not None else ""
    intervals = (
        score_interval(first_run.task, name, a, first.graded),
        score_interval(second_run.task, name, b, second.graded),
    )
    if None in intervals:
        return None
    return unpaired_difference(a, first.graded, b, second.graded)


def is_lora(run: ComparedRun) -> bool:
    """Return whether only adapters were trained."""
    return run.tuning is Tuning.LORA


def _is_mean(score: float, grades: Mapping[str, float]) -> bool:
    """Return whether ``score`` is the mean of ``grades``."""
    return bool(grades) and math.isclose(fmean(grades.values()), score, rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE)


def perplexity_at(points: Iterable[Point], hours: float) -> float | None:
    """Return the newest validation perplexity after ``hours`` of training, None before the first one. ``points`` are
    those of a run, ordered by step."""
    found = None
    for point in points:
        if point.hours > hours:
            break
        if point.row.perplexity is not None:
            found = point.row.perplexity
    return found


def scored_rows(scores: Scores) -> str:
    """Return which rows were scored, for people."""
    return f"{scores.examples} {scores.rows.lower()} examples" if scores.rows else f"{scores.examples} examples"
