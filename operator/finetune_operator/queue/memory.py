"""In-memory state of each job between two reconciles: the newest report of the current attempt, the pods that may send
reports, and the time of the last status write.

`observe/observer.py` stores which attempt may report, and `reports/server.py` stores the reports of that attempt. A
restart of the operator loses this state without harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.contract import Report
from finetune_core.contract.stock_reports import StockReport
from finetune_operator.queue.retryable import RetryableError
from finetune_operator.queue.speed import StepWindow
from finetune_operator.queue.work_queue import Key

MIN_SECONDS_BETWEEN_PROGRESS_WRITES = 10.0
"""Least seconds between a status write of a job and the next write in which only numbers (step, loss, speed) differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportingAttempt:
    """The attempt whose pods may send reports for a job."""

    uid: str
    """`metadata.uid` of the FineTuneJob."""
    attempt: int
    pod_uids: frozenset[str]
    ranks: int = 1
    """Number of training processes of the attempt, over all its pods."""


@dataclass(slots=True)
class JobMemory:
    """In-memory state of one job. Times are seconds of the monotonic clock unless the type is a datetime."""

    resource_version: str = ""
    """`metadata.resourceVersion` of the job at the last reconcile."""
    reporting: ReportingAttempt | None = None
    report: Report | None = None
    """Newest report of the attempt in `reporting`. It is kept for a while after that attempt has ended."""
    reported_at: datetime | None = None
    speed: StepWindow = field(default_factory=StepWindow)
    """Recent training speed, from the newest reports of the attempt. A new attempt keeps the speed of the one before
    until it has reported two steps."""
    event_created_at: dict[str, float] = field(default_factory=dict)
    """For each event reason that may recur: when an event with this reason was last created."""
    status_written_at: float | None = None
    progress_write_at: float | None = None
    """Earliest time of the next status write with only new numbers, by the limit for all jobs together
    (`status/budget.py`). None where no such write waits."""
    problem: RetryableError | None = None
    """Error of the last try to create the job's objects; None where the last try succeeded."""
    retry_at: float = 0.0
    """Time of the next try to create the objects, after the error in `problem`."""
    failures: int = 0
    """Number of consecutive tries that ended with a RetryableError."""
    start_errors: dict[str, float] = field(default_factory=dict)
    """For each uid of a pod whose container waits with an error of its runtime: when this was first seen."""
    hint: str = ""
    """Text of the newest warning event about the pods or the child object that the job waits for; empty if none."""
    hint_read_at: float | None = None

    def seconds_to_progress_write(self, now: float) -> float:
        """Return for how many seconds a status write with only new numbers must wait; 0.0 where it may happen now."""
        own = self.status_written_at
        due = max(now if own is None else own + MIN_SECONDS_BETWEEN_PROGRESS_WRITES, self.progress_write_at or 0.0)
        return max(0.0, due - now)


class Memory:
    """In-memory state of all jobs, by key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an empty memory. ``clock`` returns monotonic seconds."""
        self._clock = clock
        self._jobs: dict[Key, JobMemory] = {}

    def job_keys(self) -> list[Key]:
        """Return the keys of all jobs in memory."""
        return list(self._jobs)

    def job(self, key: Key) -> JobMemory:
        """Return the state of the job ``key``; create an empty state where the job has none."""
        return self._jobs.setdefault(key, JobMemory())

    def has_read(self, key: Key, resource_version: str) -> bool:
        """Return whether a reconcile has already read the job with this ``metadata.resourceVersion``."""
        job = self._jobs.get(key)
        return job is not None and job.resource_version == resource_version

    def reporting_attempt(self, key: Key) -> ReportingAttempt | None:
        """Return the attempt whose pods may report for the job ``key``; None where no attempt is known."""
        job = self._jobs.get(key)
        return job.reporting if job else None

    def set_reporting_attempt(self, key: Key, reporting: ReportingAttempt | None) -> None:
        """From now on accept only reports of the attempt ``reporting``; drop a stored report of another attempt."""
        job = self.job(key)
        old = job.reporting
        if reporting is None or old is None or (old.uid, old.attempt) != (reporting.uid, reporting.attempt):
            job.report = job.reported_at = None
            _end_attempt(job)
        job.reporting = reporting

    def stop_reporting(self, key: Key) -> None:
        """Accept no report until the next attempt. Keep the newest report, so that the status can still show it."""
        job = self.job(key)
        job.reporting = None
        _end_attempt(job)

    def store_report(self, key: Key, report: Report, received: datetime) -> None:
        """Store ``report`` as the newest report of the job's attempt, and measure the training speed by its step."""
        job = self.job(key)
        job.report, job.reported_at = report, received
        step = report.reported_step if isinstance(report, StockReport) else report.step
        if report.total_steps and step is not None:
            job.speed.add(self._clock(), step)

    def seconds_to_progress_write(self, key: Key) -> float:
        """Return for how many seconds a status write of ``key`` with only new numbers must wait."""
        return self.job(key).seconds_to_progress_write(self._clock())

    def forget(self, key: Key) -> None:
        """Drop the state of a job that no longer exists."""
        self._jobs.pop(key, None)


def _end_attempt(job: JobMemory) -> None:
    """Start a new speed window and drop the warning event, because both belong to the attempt that ended."""
    job.speed.start_new()
    job.hint, job.hint_read_at = "", None
