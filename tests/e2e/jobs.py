"""What end-to-end tests share about jobs: how a manifest is made, and predicates that `steps.wait_for_job` waits for.

The fixture `tiny_job` of `conftest.py` has the type `MakeJob`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_core.api.job import FineTuneJob

Manifest = dict[str, Any]
MakeJob = Callable[..., Manifest]
"""A function that takes the job's name and changes of the quickstart, such as ``spec__training__maxSteps=300``, and
returns the manifest."""
JobPredicate = Callable[[FineTuneJob], bool]
"""A function that returns whether a job's status shows what a test waits for."""


def has_checkpoint(step: int) -> JobPredicate:
    """Return a predicate that holds once the status lists a checkpoint of ``step`` or of a later step."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.step >= step for checkpoint in job.status.checkpoints)

    return reached


def has_checkpoint_of_run(run: int) -> JobPredicate:
    """Return a predicate that holds once the status lists a checkpoint that was committed by the run with number
    ``run``."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.run == run for checkpoint in job.status.checkpoints)

    return reached


def has_started(attempts: int) -> JobPredicate:
    """Return a predicate that holds once at least ``attempts`` attempts of the job have started."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.attempts.started >= attempts

    return reached


def has_started_exactly(attempts: int) -> JobPredicate:
    """Return a predicate that holds while exactly ``attempts`` attempts of the job have started, and no further one."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.attempts.started == attempts

    return reached
