"""The lines that `finetune watch` writes into logs and pipes: one line for each change between two states of a
FineTuneJob.

The functions are pure. `finetune watch` calls `new_lines` where the output is not a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune_cli.formatting import duration, number, seconds_between, size
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

PROGRESS_EVERY_PERCENT = 5
"""Smallest advance, in percent of all steps, for which a line about the progress is written. The advance is counted
from the state for which lines were last written. A line is always written for the first progress of a job, for the last
step, and for a return to a lower percentage."""


def new_lines(shown: FineTuneJob | None, job: FineTuneJob) -> list[str]:
    """Return the lines about what has changed between ``shown``, the state for which lines were last written, and
    ``job``, the newest state of the job. ``shown`` is None before the first line.

    There are lines about the state, ended attempts, the progress, incidents, checkpoints, the artifact and scores. A
    small advance of the training gets no line (see PROGRESS_EVERY_PERCENT), so that the log of a long run stays
    readable.
    """
    return [
        *_state(shown, job),
        *_attempts(shown, job),
        *_progress(shown, job),
        *_incidents(shown, job),
        *_results(shown, job),
        *_scores(shown, job),
    ]


def _state(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    def words(seen: FineTuneJob) -> str:
        text = f"{state(seen)}: {state_message(seen)}" if state_message(seen) else state(seen)
        return f"{text} ({blocking_message(seen)})" if blocking_message(seen) else text

    # While the job runs, there is no line if only the message has changed. The message may contain the step, which the
    # lines about the progress show already.
    if shown is None or state(shown) != state(job) or (state(job) != "Running" and words(shown) != words(job)):
        yield words(job)


def _attempts(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    known = {past.number for past in status_of(shown).attempts.recent} if shown else set()
    for past in status_of(job).attempts.recent:
        if past.number not in known and past.verdict != "Succeeded":
            after = duration(seconds_between(past.start_time, past.end_time))
            yield f"attempt {past.number} ended after {after}: {past.reason} ({past.verdict.lower()}): {past.message}"


def _progress(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    progress = status_of(job).progress
    if progress is None or not progress.total_steps:
        return
    before = status_of(shown).progress if shown else None
    if before is not None and progress.step == before.step:
        return
    advanced = progress.percentage - (before.percentage if before else 0)
    # A lower percentage than before is shown at once. It means that the job has resumed from a checkpoint.
    if before is not None and 0 <= advanced < PROGRESS_EVERY_PERCENT and progress.step < progress.total_steps:
        return
    words = [f"step {progress.step}/{progress.total_steps}"]
    words += [f"{name} {number(found.value)}" for name in ("loss", "perplexity") if (found := metric(job, name))]
    if progress.tokens_per_second is not None:
        words.append(f"{number(progress.tokens_per_second)} tokens/s")
    if progress.eta_seconds is not None and ending(job) is None:
        words.append(f"{duration(progress.eta_seconds)} left")
    yield ", ".join(words)


def _incidents(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    known = {(seen.step, seen.kind) for seen in status_of(shown).incidents} if shown else set()
    for found in status_of(job).incidents:
        if (found.step, found.kind) not in known:
            yield f"{found.kind} at step {found.step} ({found.action}): {found.message}"


def _scores(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    evaluation, before = status_of(job).evaluation, status_of(shown).evaluation if shown else None
    if evaluation is None:
        return
    for model, scores, known in (
        ("base model", evaluation.base, before.base if before else None),
        ("tuned model", evaluation.tuned, before.tuned if before else None),
    ):
        if scores is not None and scores != known:
            values = ", ".join(
                f"{name} {number(value)}" for name, value in scores_by_name(scores, task_of(job)).items()
            )
            yield f"{model} on {evaluation.examples} {evaluation.rows.lower()} examples: {values}"
            if text := ungraded_text(scores):
                yield f"{model}: {text}"
    if (meaning := risen_text(evaluation)) and not (before is not None and risen_text(before)):
        yield meaning
    told = before.requirements if before is not None else []
    for found in evaluation.requirements:
        if found not in told:
            figures = [("base", found.base), ("tuned", found.tuned), ("difference", found.difference)]
            # All digits are shown, because a rounded score may look like its bound.
            measured = ", ".join(f"{name} {value}" for name, value in figures if value is not None)
            verdict = "passed" if found.passed else "failed"
            yield f"required {found.score} {required_text(found)}: {verdict} ({measured or 'not measured'})"


def _results(shown: FineTuneJob | None, job: FineTuneJob) -> Iterator[str]:
    known = {(point.run, point.step) for point in status_of(shown).checkpoints} if shown else set()
    for point in status_of(job).checkpoints:
        if (point.run, point.step) not in known:
            score = f", perplexity {number(point.perplexity)}" if point.perplexity is not None else ""
            yield f"checkpoint of step {point.step} committed ({size(point.bytes)}{score})"
    told = {(point.run, point.step) for point in status_of(shown).checkpoints if point.damaged} if shown else set()
    for point in status_of(job).checkpoints:
        if point.damaged and (point.run, point.step) not in told:
            yield f"checkpoint of step {point.step} is damaged: {point.damaged}"
    artifact = status_of(job).artifact
    if artifact and not (shown and status_of(shown).artifact):
        yield f"artifact of step {artifact.step} ({size(artifact.bytes)}): {artifact.uri}"
