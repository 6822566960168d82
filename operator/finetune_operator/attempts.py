"""The life of attempts: what is recorded, when one ends, when the next may start. Pure functions on
`status.attempts`; `reconcile` writes their result before it touches any object, so that a crash repeats nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from finetune_core.api.conditions import Reason
from finetune_core.api.status import (
    RECENT_ATTEMPTS_LIMIT,
    AttemptCause,
    AttemptsStatus,
    CheckpointStatus,
    CurrentAttempt,
    PastAttempt,
    PodRecord,
)
from finetune_core.contract import Result
from finetune_operator import messages
from finetune_operator.observed import ChildObservation, PodObservation
from finetune_operator.verdict import Ruling, Verdict, judge, stronger

MOST_ATTEMPTS = 999
FREE_IN_A_ROW = 3
"""After this many free attempts without a new checkpoint the next one is charged."""
LEAVE_TOGETHER = timedelta(seconds=10)
"""Time for the other pods to say why they end, before the attempt is closed."""
TERMINATING_LIMIT = timedelta(seconds=60)
"""A pod whose grace period ended this long ago is waited for no more: its kubelet is dead, the store fences it."""
FIRST_BACKOFF_SECONDS = 10
LONGEST_BACKOFF_SECONDS = 300
TEXT_LIMIT = 1024


class Next(Enum):
    """What the reconciler does after the bookkeeping."""

    OPEN = auto()
    """The next attempt was numbered: write it, then create its objects."""
    CREATE = auto()
    """Create the objects of the current attempt."""
    REMOVE = auto()
    """Delete the objects of the attempt that ended."""
    WATCH = auto()
    """The attempt goes on, or something is waited for."""
    SETTLE = auto()
    """The job has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What was read for a job that is not settled."""

    now: datetime
    nodes: int
    max_retries: int
    child: ChildObservation | None
    """Object of the current attempt; between attempts that of the one that ended last."""
    child_uid: str
    """Its uid as recorded in the status; empty: never seen."""
    pods: Sequence[PodObservation]
    """Pods of every attempt."""
    checkpoints: Sequence[CheckpointStatus]
    final_result: Result | None
    """From the final report of the current attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Attempts as they are to be recorded, and what comes next."""

    attempts: AttemptsStatus
    next: Next
    wait_seconds: float | None = None
    """When to look again though nothing happens."""
    settled: Settlement | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settlement:
    """How the job ended."""

    succeeded: bool
    reason: str
    message: str
    result: Result | None = None


def advance(attempts: AttemptsStatus, world: World) -> Step:
    """Return the next step of a job that is not settled."""
    if attempts.current is None:
        return _between(attempts, world)
    return _during(attempts, attempts.current, world)


def _between(attempts: AttemptsStatus, world: World) -> Step:
    """No attempt exists: clear the old one away, wait for its pods and the back-off, number the next."""
    if world.child is not None and not world.child.deleting:
        return Step(attempts=attempts, next=Next.REMOVE, wait_seconds=1)
    waits = [seconds for pod in world.pods if (seconds := _seconds_until_gone(pod, world.now)) > 0]
    if attempts.next_start_time is not None:
        waits.append((attempts.next_start_time - world.now).total_seconds())
    if world.child is not None:
        waits.append(1)
    if waits and max(waits) > 0:
        return Step(attempts=attempts, next=Next.WATCH, wait_seconds=max(waits))
    return _open(attempts, world)


def _open(attempts: AttemptsStatus, world: World) -> Step:
    """Nothing of an older attempt is left and no back-off holds: number the next one.

    What must be known before any GPU is asked for is asked here.
    """
    current = CurrentAttempt(number=attempts.started + 1, start_time=world.now)
    opened = attempts.model_copy(update={"started": attempts.started + 1, "current": current, "next_start_time": None})
    return Step(attempts=opened, next=Next.OPEN)


def _during(attempts: AttemptsStatus, current: CurrentAttempt, world: World) -> Step:
    """An attempt exists: record its pods, judge the evidence, and close it once it has ended."""
    pods = [pod for pod in world.pods if pod.attempt == current.number]
    suspended = world.child is not None and world.child.suspended
    current = current.model_copy(update={"pods": [] if suspended else _record(current.pods, pods)})
    ruling = judge(
        current=current,
        child=world.child,
        child_uid=world.child_uid,
        pods=pods,
        nodes=world.nodes,
        final_result=world.final_result,
    )
    if ruling is not None and ruling.verdict is Verdict.SUCCEEDED:
        settled = Settlement(succeeded=True, reason=ruling.reason, message=ruling.message, result=ruling.result)
        cause = _cause(ruling, world.now)
        return Step(attempts=_closed(attempts, current, cause, world), next=Next.SETTLE, settled=settled)
    if ruling is not None and stronger(current.cause, ruling):
        current = current.model_copy(update={"cause": _cause(ruling, world.now)})
    attempts = attempts.model_copy(update={"current": current})
    if current.cause is None:
        if world.child is None and not world.child_uid:
            return Step(attempts=attempts, next=Next.CREATE)
        return Step(attempts=attempts, next=Next.WATCH)
    return _ending(attempts, current, current.cause, pods, world)


def _ending(
    attempts: AttemptsStatus,
    current: CurrentAttempt,
    cause: AttemptCause,
    pods: Sequence[PodObservation],
    world: World,
) -> Step:
    """The cause is known: close the attempt once all pods have ended, at once where nothing can change it."""
    permanent = cause.verdict == Verdict.PERMANENT
    left = (cause.time + LEAVE_TOGETHER - world.now).total_seconds()
    if not permanent and left > 0 and not all(pod.ended for pod in pods):
        return Step(attempts=attempts, next=Next.WATCH, wait_seconds=left)
    closed = _closed(attempts, current, cause, world)
    if permanent:
        settled = Settlement(succeeded=False, reason=cause.reason, message=cause.message)
        return Step(attempts=closed, next=Next.SETTLE, settled=settled)
    if closed.charged > world.max_retries or closed.started >= MOST_ATTEMPTS:
        message = messages.retries_exhausted(closed.charged, cause.message)
        settled = Settlement(succeeded=False, reason=Reason.RETRIES_EXHAUSTED, message=message)
        return Step(attempts=closed, next=Next.SETTLE, settled=settled)
    delay = backoff(closed, world.checkpoints)
    closed = closed.model_copy(update={"next_start_time": world.now + delay})
    return Step(attempts=closed, next=Next.REMOVE, wait_seconds=0)


def _record(records: Sequence[PodRecord], pods: Sequence[PodObservation]) -> list[PodRecord]:
    """Return the first pod seen for each index; the node is filled in once the same pod has one."""
    known = {record.index: record for record in records}
    for pod in pods:
        record = known.get(pod.index)
        if record is None:
            known[pod.index] = PodRecord(index=pod.index, name=pod.name, uid=pod.uid, node=pod.node)
        elif record.uid == pod.uid and not record.node and pod.node:
            known[pod.index] = record.model_copy(update={"node": pod.node})
    return [known[index] for index in sorted(known)]


def _cause(ruling: Ruling, now: datetime) -> AttemptCause:
    return AttemptCause(
        verdict=ruling.verdict,
        reason=ruling.reason[:64],
        message=ruling.message[:TEXT_LIMIT],
        node=ruling.node,
        time=now,
    )


def _closed(attempts: AttemptsStatus, current: CurrentAttempt, cause: AttemptCause, world: World) -> AttemptsStatus:
    """Account the attempt: once, because `current` is gone afterwards."""
    verdict = cause.verdict
    if verdict == Verdict.FREE and _free_row(attempts.recent, world.checkpoints) >= FREE_IN_A_ROW:
        progressed = _progressed(current.start_time, world.checkpoints)
        verdict = verdict if progressed else Verdict.CHARGED
    past = PastAttempt(
        number=current.number,
        verdict=verdict,
        reason=cause.reason,
        message=cause.message,
        node=cause.node,
        start_time=current.start_time,
        end_time=world.now,
    )
    return attempts.model_copy(
        update={
            "charged": attempts.charged + (verdict == Verdict.CHARGED),
            "free": attempts.free + (verdict == Verdict.FREE),
            "current": None,
            "recent": [*attempts.recent, past][-RECENT_ATTEMPTS_LIMIT:],
        }
    )


def _progressed(started: datetime, checkpoints: Sequence[CheckpointStatus]) -> bool:
    """Whether a checkpoint was committed since ``started``."""
    return any(checkpoint.time >= started for checkpoint in checkpoints)


def _free_row(recent: Sequence[PastAttempt], checkpoints: Sequence[CheckpointStatus]) -> int:
    """Return how many of the newest attempts in a row were free and committed nothing."""
    row = 0
    for past in reversed(recent):
        if past.verdict != Verdict.FREE or _progressed(past.start_time, checkpoints):
            break
        row += 1
    return row


def backoff(attempts: AttemptsStatus, checkpoints: Sequence[CheckpointStatus]) -> timedelta:
    """Return the pause before the next attempt: 10 s, doubled for each attempt in a row that committed nothing."""
    row = 0
    for past in reversed(attempts.recent):
        if _progressed(past.start_time, checkpoints):
            break
        row += 1
    return timedelta(seconds=min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** max(0, row - 1)))


def _seconds_until_gone(pod: PodObservation, now: datetime) -> float:
    """Return how long an old pod is waited for; 0 once it counts as gone."""
    if pod.delete_deadline is None:
        return 5  # its deletion has not begun: the garbage collector is on its way
    return max(0.0, (pod.delete_deadline + TERMINATING_LIMIT - now).total_seconds())
