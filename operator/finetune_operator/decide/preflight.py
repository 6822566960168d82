"""What happens before attempt 1: a small pod checks the job, and only what it says opens the attempt. Pure functions on
`status.preflight`; `reconcile` writes their result before it touches any object, so that a crash repeats nothing.

A try is one pod. What it found is recorded, then its objects are removed, then the record is acted on: the attempt is
opened, the job ends, or the next try waits for its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, StrEnum, auto

from finetune_core.api.conditions import Reason
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import PreflightStatus
from finetune_core.contract import ExitCode
from finetune_core.contract.preflight_result import PreflightResult
from finetune_operator import messages
from finetune_operator.decide.attempts import Settlement
from finetune_operator.objects.observations import ContainerState, PodObservation
from finetune_operator.observe.waiting import pod_detail
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS, FIRST_RETRY_SECONDS
from finetune_operator.queue.work_queue import backoff_seconds

TEXT_LIMIT = 1024


class Verdict(StrEnum):
    """What a try came to; the values of `status.preflight.verdict`."""

    PASSED = "Passed"
    IMPOSSIBLE = "Impossible"
    WAITING = "Waiting"


class Next(Enum):
    """What the reconciler does, once the record is written."""

    CREATE = auto()
    """Create the objects of the next try."""
    REMOVE = auto()
    """Delete the objects of the tries in `Check.leftovers`."""
    WATCH = auto()
    """A pod runs, or something is waited for."""
    OPEN = auto()
    """Nothing holds the attempt back."""
    SETTLE = auto()
    """The job has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What the decision is made from, beside the record."""

    now: datetime
    policy: RunPolicySpec
    is_wanted: bool
    """An attempt could be opened now, and the check is not to be skipped."""
    pods: Sequence[PodObservation]
    """Preflight pods of the job; `index` is the number of the try."""
    hint: str = ""
    """Newest warning event about the pod of the current try."""
    problem: str = ""
    """Why the pod could not be created when that was last tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The record as it is to be, and what comes next."""

    record: PreflightStatus | None
    next: Next
    leftovers: Sequence[PodObservation] = ()
    cause: str = ""
    """What outside the spec is waited for, as far as it is known."""
    wait_seconds: float | None = None
    """When to look again though nothing happens."""
    settled: Settlement | None = None
    is_given_up: bool = False
    """It is not wanted any more: only its objects still have to go."""

    @property
    def number(self) -> int:
        """The try that runs, or comes next."""
        return (self.record.tries if self.record else 0) + 1

    @property
    def holds(self) -> bool:
        """Whether attempt 1 must not be opened yet."""
        return self.next is not Next.OPEN

    @property
    def is_wanted(self) -> bool:
        """Whether the check itself is what the job waits for, and not a person."""
        return self.holds and not self.is_given_up


def check(record: PreflightStatus | None, situation: Situation) -> Check:
    """Return the next step of the check; Next.OPEN where none is wanted."""
    alive = [pod for pod in situation.pods if pod.delete_deadline is None]
    if not situation.is_wanted:
        # Suspended or cancelled, or a person skips it: whatever runs is of no use any more, and begins anew later.
        if alive:
            return Check(record=record, next=Next.REMOVE, leftovers=alive, is_given_up=True)
        return Check(record=record if _passed(record) else None, next=Next.OPEN)
    if record is None:
        begun = PreflightStatus(start_time=situation.now)
        return Check(record=begun, next=Next.WATCH, wait_seconds=0)
    if leftovers := [pod for pod in alive if pod.index <= record.tries]:
        return Check(record=record, next=Next.REMOVE, leftovers=leftovers, cause=_cause(record))
    if _passed(record):
        return Check(record=record, next=Next.OPEN)
    if record.verdict == Verdict.IMPOSSIBLE:
        settled = Settlement(succeeded=False, reason=Reason.BAD_INPUT, message=record.message)
        return Check(record=record, next=Next.SETTLE, settled=settled)
    return _during(record, situation, alive)


def _during(record: PreflightStatus, situation: Situation, alive: Sequence[PodObservation]) -> Check:
    """Nothing is decided yet: watch the pod of this try, create it, or wait for its time."""
    pod = next((pod for pod in situation.pods if pod.index == record.tries + 1), None)
    ended = _end(pod) if pod is not None else None
    if ended is not None:
        recorded = _recorded(record, *ended, situation.now)
        return Check(record=recorded, next=Next.WATCH, cause=_cause(recorded), wait_seconds=0)
    waiting_for = situation.problem or (_stuck(pod, situation) if pod else "") or _cause(record)
    left = _seconds_to_deadline(record, situation)
    if left is not None and left <= 0:
        if alive:
            return Check(record=record, next=Next.REMOVE, leftovers=alive, cause=waiting_for)
        message = messages.preflight_deadline(situation.policy.pending_deadline_seconds or 0, waiting_for)
        settled = Settlement(succeeded=False, reason=Reason.DEADLINE_EXCEEDED, message=message)
        return Check(record=record, next=Next.SETTLE, settled=settled)
    if pod is not None:
        return Check(
            record=record,
            next=Next.WATCH,
            cause=waiting_for,
            wait_seconds=_earliest(left, EVENTS_EVERY_SECONDS if _is_old(pod, situation.now) else EVENTS_AFTER_SECONDS),
        )
    if record.next_try_time is not None and record.next_try_time > situation.now:
        pause = (record.next_try_time - situation.now).total_seconds()
        return Check(record=record, next=Next.WATCH, cause=waiting_for, wait_seconds=_earliest(left, pause))
    return Check(record=record, next=Next.CREATE, cause=waiting_for, wait_seconds=left)


def _passed(record: PreflightStatus | None) -> bool:
    return record is not None and record.verdict == Verdict.PASSED


def _cause(record: PreflightStatus) -> str:
    """Return what the last try found missing: it is true until a later one says otherwise."""
    return record.message if record.verdict == Verdict.WAITING else ""


def _recorded(record: PreflightStatus, verdict: Verdict, message: str, now: datetime) -> PreflightStatus:
    """Account a try: once, because its pod is a leftover afterwards."""
    pause = backoff_seconds(record.tries + 1, jitter=0, base=FIRST_RETRY_SECONDS)
    return record.model_copy(
        update={
            "tries": record.tries + 1,
            "verdict": str(verdict),
            "message": message[:TEXT_LIMIT],
            "next_try_time": now + timedelta(seconds=pause) if verdict is Verdict.WAITING else None,
        }
    )


def _end(pod: PodObservation) -> tuple[Verdict, str] | None:
    """Return what an ended pod found; None while it has not ended. Only findings end a job, never a broken pod."""
    container = pod.container
    if container is not None and container.state is ContainerState.TERMINATED:
        result = PreflightResult.from_termination_message(container.message)
        if container.exit_code == ExitCode.DONE:
            return Verdict.PASSED, "; ".join(result.notices) if result else ""
        if result is not None and result.findings:
            return Verdict.IMPOSSIBLE if result.is_final else Verdict.WAITING, result.sentence
        if pod.delete_deadline is None:
            # The kubelet puts the end of the log into the message where the program left none.
            last_line = (container.message.strip().splitlines() or [""])[-1]
            return Verdict.WAITING, messages.preflight_broke(container.exit_code, container.reason, last_line)
    if pod.delete_deadline is not None:
        return Verdict.WAITING, messages.pod_deleted(pod.name)
    if pod.ended:
        return Verdict.WAITING, messages.pod_failed(pod.name, pod.reason, pod.message)
    return None


def _stuck(pod: PodObservation, situation: Situation) -> str:
    """Return why the pod does not run, once it has had time to; empty while it does or nothing is known."""
    if pod.running or not _is_old(pod, situation.now):
        return ""
    detail = pod_detail(pod, situation.hint)
    return messages.waiting_pod(pod.name, detail) if detail else ""


def _is_old(pod: PodObservation, now: datetime) -> bool:
    return (now - pod.created_at).total_seconds() >= EVENTS_AFTER_SECONDS


def _seconds_to_deadline(record: PreflightStatus, situation: Situation) -> float | None:
    """Return what is left of `runPolicy.pendingDeadlineSeconds`; None without one."""
    limit = situation.policy.pending_deadline_seconds
    if limit is None:
        return None
    return (record.start_time + timedelta(seconds=limit) - situation.now).total_seconds()


def _earliest(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return min(known) if known else None
