"""In-memory state of each job between two reconciles, for example the newest report of the current attempt, the pods
that may send reports, and the time of the last status write.

The state belongs to the uid of a job, because a job that was deleted and created again under the same name is another
job. The new job must not show the progress of the deleted job, and must not wait for the back-off of the deleted job.

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
from finetune_operator.queue.key import Key
from finetune_operator.queue.retryable import RetryableError
from finetune_operator.queue.speed import StepWindow
from finetune_operator.queue.token_bucket import TokenBucket

MIN_SECONDS_BETWEEN_PROGRESS_WRITES = 10.0
"""Shortest time in seconds from a status write of a job to a write in which only numbers (step, loss, speed) differ."""
REPORTED_WRITES_PER_SECOND = 0.1
REPORTED_WRITES_BURST = 3.0
"""Limit on the writes that the reports of one job may cause: three at once, and then one every ten seconds. The limit
holds for writes of the status and, separately, for rounds of annotating the job's pods. A pod with a valid token
chooses how often it reports and what, so no content of a report is exempt."""


def _reported_writes() -> TokenBucket:
    return TokenBucket(per_second=REPORTED_WRITES_PER_SECOND, burst=REPORTED_WRITES_BURST)


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

    uid: str = ""
    """`metadata.uid` of the FineTuneJob that the state belongs to."""
    resource_version: str = ""
    """`metadata.resourceVersion` of the job at the last reconcile."""
    reporting: ReportingAttempt | None = None
    report: Report | None = None
    """Newest report of the attempt in `reporting`. The report is kept after the end of that attempt, until the next
    attempt may report or the job ends."""
    reported_at: datetime | None = None
    speed: StepWindow = field(default_factory=StepWindow)
    """Recent training speed, from the newest reports of the attempt. Until a new attempt has reported two steps, the
    speed of the previous attempt is kept."""
    event_created_at: dict[str, float] = field(default_factory=dict)
    """For each event reason that may recur: when an event with this reason was last created."""
    status_written_at: float | None = None
    progress_write_at: float | None = None
    """Earliest time of the next status write with only new numbers, by the limit for all jobs together
    (`status/writer.py`). None where no such write waits."""
    reported_writes: TokenBucket = field(default_factory=_reported_writes)
    """Limits the reconciles and status writes that reports of the job cause."""
    reported_write_at: float | None = None
    """Earliest time of the next reconcile and status write for the sake of a report. This reserved time is called a
    turn. The token for the turn is already taken from `reported_writes`. None where no turn is reserved."""
    has_reported_turn: bool = False
    """Whether the reconcile that runs now has taken the turn that was reserved in `reported_write_at`. If so, the
    reconcile may write changes that come from a report."""
    annotation_writes: TokenBucket = field(default_factory=_reported_writes)
    """Limits the annotations of the job's pods."""
    settled_version: str = ""
    """`metadata.resourceVersion` at which the job had ended and every object whose removal was due was removed. Empty
    before that."""
    problem: RetryableError | None = None
    """Why nothing can be created for the job at present: the error of the last try to create its objects, or BadInput
    where its spec or status can't be read or run. None where no such error is known, for example before the first try,
    after a try that succeeded, and for a new attempt."""
    retry_at: float = 0.0
    """Time of the next try to create the objects, after the error in `problem`."""
    failures: int = 0
    """Number of consecutive tries that ended with a RetryableError."""
    undeletable_pods: set[str] = field(default_factory=set)
    """Uids of orphaned pods whose deletion the API server has refused, for example because of an admission policy."""
    start_errors: dict[str, float] = field(default_factory=dict)
    """For each pod, by uid, whose container waits because of an error of the container runtime: when the operator first
    saw the container wait."""
    hint: str = ""
    """Text of the newest warning event about the pods or the child object that the job waits for; empty if none."""
    hint_read_at: float | None = None

    def seconds_to_progress_write(self, now: float) -> float:
        """Return for how many seconds a status write with only new numbers must wait; 0.0 where it may happen now."""
        own = self.status_written_at
        earliest = now if own is None else own + MIN_SECONDS_BETWEEN_PROGRESS_WRITES
        return max(0.0, max(earliest, self.progress_write_at or 0.0, self.reported_write_at or 0.0) - now)

    def reserve_reported_turn(self, now: float) -> float:
        """Return in how many seconds the job may be reconciled for the sake of a report. Reserves a turn where none is
        reserved yet."""
        if self.reported_write_at is None:
            self.reported_write_at = self.reported_writes.reserve(now)
        return max(0.0, self.reported_write_at - now)

    def begin_reconcile(self, now: float) -> None:
        """Give a turn whose time has come to the reconcile that begins now.

        The turn is used up even where the reconcile fails or has nothing to write. Otherwise each further report would
        cause a reconcile at once, until a reconcile can write.
        """
        self.has_reported_turn = self.reported_write_at is not None and self.reported_write_at <= now
        if self.has_reported_turn:
            self.reported_write_at = None

    def seconds_to_reported_write(self, now: float) -> float:
        """Return for how many seconds this reconcile must not write changes from a report; 0.0 where it may write them.

        Where the reconcile has no turn yet, a turn is reserved.
        """
        if self.has_reported_turn:
            return 0.0
        left = self.reserve_reported_turn(now)
        self.begin_reconcile(now)  # takes the turn at once where it need not wait
        return left

    def status_written(self, now: float) -> None:
        """Note that the status was written at ``now``, and with it everything that was reported until then."""
        self.status_written_at = now
        self.progress_write_at = None
        self.has_reported_turn = False


class Memory:
    """In-memory state of all jobs. Each state belongs to the key and the uid of a job."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an empty memory. ``clock`` returns monotonic seconds."""
        self._clock = clock
        self._jobs: dict[Key, JobMemory] = {}

    def job_keys(self) -> list[Key]:
        """Return the keys of all jobs in memory."""
        return list(self._jobs)

    def job(self, key: Key, uid: str) -> JobMemory:
        """Return the state of the job ``key`` with ``uid``.

        An empty state is created where the job has none, and where the state in memory belongs to an earlier job of the
        same name, which must have been deleted.
        """
        job = self._jobs.get(key)
        if job is None or job.uid != uid:
            job = self._jobs[key] = JobMemory(uid=uid)
        return job

    def has_read(self, key: Key, resource_version: str) -> bool:
        """Return whether the last reconcile of the job ``key`` has read it with this `metadata.resourceVersion`."""
        job = self._jobs.get(key)
        return job is not None and job.resource_version == resource_version

    def reporting_attempt(self, key: Key) -> ReportingAttempt | None:
        """Return the attempt whose pods may report for the job ``key``; None where no attempt is known."""
        job = self._jobs.get(key)
        return job.reporting if job else None

    def newest_report(self, key: Key, uid: str) -> Report | None:
        """Return the newest report of the job ``key`` with ``uid``; None where the memory has no report of this job."""
        job = self._jobs.get(key)
        return job.report if job is not None and job.uid == uid else None

    def set_reporting_attempt(self, key: Key, uid: str, reporting: ReportingAttempt | None) -> None:
        """From now on accept only reports of the attempt ``reporting`` of the job ``key`` with ``uid``.

        A stored report of another attempt is dropped. Where ``reporting`` is None, no report is accepted, and the
        stored report is dropped.
        """
        job = self.job(key, uid)
        old = job.reporting
        if reporting is None or old is None or (old.uid, old.attempt) != (reporting.uid, reporting.attempt):
            job.report = job.reported_at = None
            _end_attempt(job)
        job.reporting = reporting

    def stop_reporting(self, key: Key, uid: str) -> None:
        """Accept no report of the job ``key`` with ``uid`` until its next attempt.

        The newest report is kept, so that the status can still show it.
        """
        job = self.job(key, uid)
        # The method is called in every reconcile without an attempt. The warning event of a preflight check, and the
        # time at which it was read, must outlast these calls.
        if job.reporting is not None:
            _end_attempt(job)
        job.reporting = None

    def store_report(self, key: Key, uid: str, report: Report, received: datetime) -> float | None:
        """Store ``report`` as the newest report of the job ``key`` with ``uid``, and measure the training speed by it.

        ``received`` is the time at which the report arrived. Returns the seconds after which the job's status may be
        written. The caller queues the job for that time, because an earlier reconcile would cost requests and write
        nothing. Returns None, and stores nothing, where the memory no longer has the state of this job. The job may
        have been deleted, and created again, while its report was checked.
        """
        job = self._jobs.get(key)
        if job is None or job.uid != uid:
            return None
        more = job.report is None or _news(report) != _news(job.report)
        job.report, job.reported_at = report, received
        step = report.reported_step if isinstance(report, StockReport) else report.step
        if report.total_steps and step is not None:
            job.speed.add(self._clock(), step)
        now = self._clock()
        turn = job.reserve_reported_turn(now)
        return turn if more else max(turn, job.seconds_to_progress_write(now))

    def reserve_reported_turn(self, key: Key, uid: str) -> float:
        """Return in how many seconds the job ``key`` may be reconciled for the sake of a report. Reserves a turn where
        none is reserved yet."""
        return self.job(key, uid).reserve_reported_turn(self._clock())

    def begin_reconcile(self, key: Key) -> None:
        """Note that a reconcile of ``key`` begins. The reconcile uses up a turn that a report has reserved and that is
        due."""
        if (job := self._jobs.get(key)) is not None:
            job.begin_reconcile(self._clock())

    def has_settled(self, key: Key, resource_version: str) -> bool:
        """Return whether the job ``key`` has ended, and nothing was due for it at this `metadata.resourceVersion`."""
        job = self._jobs.get(key)
        return job is not None and job.settled_version == resource_version

    def forget(self, key: Key) -> None:
        """Drop the state of a job that no longer exists."""
        self._jobs.pop(key, None)


def _news(report: Report) -> tuple[object, ...]:
    """Return those parts of ``report`` whose changes are news, and not only new numbers.

    A status write with only new numbers waits for the limit of all jobs (`status/writer.py`), and a write of news does
    not. `status/urgency.py` lists the fields and conditions of the status that follow from the returned parts.
    """
    return (
        report.checkpoints,
        report.best,
        report.evaluation,
        report.incidents,
        report.ranks,
        report.pod_uid,
        bool(report.checkpoint_problem),
        report.result is not None,
    )


def _end_attempt(job: JobMemory) -> None:
    """Start a new speed window and drop the warning event, because both belong to the attempt that ended."""
    job.speed.start_new()
    job.hint, job.hint_read_at = "", None
