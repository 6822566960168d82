"""What the operator remembers of each job between two looks, lost at a restart without harm: the newest report of
the current attempt, which pods may report, and when the status was last written.

The reconciler writes the attempt and reads the report; the report server does the opposite.
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
"""Between two writes of a job's status for nothing but new numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportingAttempt:
    """Who may report: the pods of one attempt of one job."""

    uid: str
    """uid of the FineTuneJob."""
    attempt: int
    pod_uids: frozenset[str]
    ranks: int = 1
    """Training processes over all pods."""


@dataclass(slots=True)
class JobMemory:
    """Memory of one job."""

    version: str = ""
    """metadata.resourceVersion of the job at its last look."""
    reporting: ReportingAttempt | None = None
    report: Report | None = None
    """Newest report of `reporting.attempt`."""
    reported_at: datetime | None = None
    speed: StepWindow = field(default_factory=StepWindow)
    """Of all attempts: it outlives a resume."""
    told: dict[str, float] = field(default_factory=dict)
    """When an event of a reason was last created, on the monotonic clock."""
    status_written_at: float | None = None
    """On the monotonic clock."""
    progress_write_at: float | None = None
    """When new numbers have their place among the writes of all jobs, once they asked for one."""
    problem: RetryableError | None = None
    """What the last try to create the attempt met."""
    retry_at: float = 0.0
    """When it is tried again, on the monotonic clock."""
    failures: int = 0
    """Tries in a row that met a problem."""
    hint: str = ""
    """Newest warning event about what the attempt waits for."""
    hint_read_at: float | None = None

    def seconds_to_numbers(self, now: float) -> float:
        """Return how long new numbers wait before they are written; 0 where they may be now."""
        own = self.status_written_at
        due = max(now if own is None else own + MIN_SECONDS_BETWEEN_PROGRESS_WRITES, self.progress_write_at or 0.0)
        return max(0.0, due - now)


class Memory:
    """Memory of all jobs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing: every entry is made by the first look at its job."""
        self._clock = clock
        self._jobs: dict[Key, JobMemory] = {}

    def __len__(self) -> int:
        """Return how many jobs are remembered."""
        return len(self._jobs)

    def known(self) -> list[Key]:
        """Return the keys of all remembered jobs."""
        return list(self._jobs)

    def of(self, key: Key) -> JobMemory:
        """Return the memory of a job, new where there is none."""
        return self._jobs.setdefault(key, JobMemory())

    def has_seen(self, key: Key, version: str) -> bool:
        """Tell whether a look has read the job in this version: what it says is known then."""
        job = self._jobs.get(key)
        return job is not None and job.version == version

    def reporting(self, key: Key) -> ReportingAttempt | None:
        """Return who may report for a job; None where no attempt is known."""
        job = self._jobs.get(key)
        return job.reporting if job else None

    def expect(self, key: Key, reporting: ReportingAttempt | None) -> None:
        """Record who may report from now on; a report of another attempt is forgotten."""
        job = self.of(key)
        old = job.reporting
        if reporting is None or old is None or (old.uid, old.attempt) != (reporting.uid, reporting.attempt):
            job.report = job.reported_at = None
            job.speed.interrupt()
            job.hint, job.hint_read_at = "", None
        job.reporting = reporting

    def close(self, key: Key) -> None:
        """Nobody may report until the next attempt; the newest report stays until it is written."""
        job = self.of(key)
        job.reporting = None
        job.speed.interrupt()
        job.hint, job.hint_read_at = "", None

    def remember(self, key: Key, report: Report, received: datetime) -> None:
        """Keep ``report`` as the newest of the job's attempt."""
        job = self.of(key)
        job.report, job.reported_at = report, received
        step = report.reported_step if isinstance(report, StockReport) else report.step
        if report.total_steps and step is not None:
            job.speed.note(self._clock(), step)

    def seconds_to_numbers(self, key: Key) -> float:
        """Return how long new numbers of a job wait before they are written."""
        return self.of(key).seconds_to_numbers(self._clock())

    def forget(self, key: Key) -> None:
        """Drop a job that no longer exists."""
        self._jobs.pop(key, None)
