"""What several end-to-end tests use for jobs: the type `MakeJob` of the fixture `tiny_job`, time limits of waits, and
functions that make predicates for `steps.wait_for_job`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_core.api.job import FineTuneJob

Manifest = dict[str, Any]
MakeJob = Callable[..., Manifest]
"""A function that returns the manifest of a job. Its arguments are the job's name and changes to
examples/quickstart.yaml, such as ``spec__training__maxSteps=300``."""
STARTED_SECONDS = 300
"""Limit of a wait in which a preflight check runs or a trainer starts. Both import torch, which alone takes more than a
minute on a machine with four busy processes for each processor."""
LEFT_SECONDS = 180
"""Limit of a wait in which pods end. They have 90 s to save a checkpoint after SIGTERM."""
JobPredicate = Callable[[FineTuneJob], bool]
"""A function that gets a job, and returns whether the job has the status that a test waits for."""


def has_checkpoint(step: int) -> JobPredicate:
    """Return a predicate that is true when the status lists a checkpoint of ``step`` or of a later step."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.step >= step for checkpoint in job.status.checkpoints)

    return reached


def has_checkpoint_of_run(run: int) -> JobPredicate:
    """Return a predicate that is true when the status lists a checkpoint of the run with number ``run``."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.run == run for checkpoint in job.status.checkpoints)

    return reached


def has_started(attempts: int) -> JobPredicate:
    """Return a predicate that is true when at least ``attempts`` attempts of the job have started."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.attempts.started >= attempts

    return reached


def has_started_exactly(attempts: int) -> JobPredicate:
    """Return a predicate that is true when exactly ``attempts`` attempts of the job have started."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.attempts.started == attempts

    return reached
