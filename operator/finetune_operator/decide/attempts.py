"""The life of attempts: what is recorded, when one ends, when the next may start. Pure functions on
`status.attempts`; `reconcile` writes their result before it touches any object, so that a crash repeats nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from finetune_core.api.conditions import Reason
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import (
    AttemptCause,
    AttemptsStatus,
    CheckpointStatus,
    CurrentAttempt,
    PodRecord,
    UsageStatus,
)
from finetune_core.contract import Result
from finetune_operator import messages
from finetune_operator.decide.accounting import backoff, cause_of, close
from finetune_operator.decide.orders import Clocks, is_active_deadline_over, ordered_end, seconds_to_deadline
from finetune_operator.decide.verdict import Verdict, is_of_an_earlier_admission, judge, stronger
from finetune_operator.objects.observations import ChildObservation, PodObservation

MOST_ATTEMPTS = 999
LEAVE_TOGETHER = timedelta(seconds=10)
"""Time for the other pods to say why they end, before the attempt is closed."""
TERMINATING_LIMIT = timedelta(seconds=60)
"""A pod whose grace period ended this long ago is waited for no more: its kubelet is dead, the store fences it."""


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
    policy: RunPolicySpec
    child: ChildObservation | None
    """Object of the current attempt; between attempts that of the one that ended last."""
    child_uid: str
    """Its uid as recorded in the status; empty: never seen."""
    pods: Sequence[PodObservation]
    """Pods of every attempt."""
    checkpoints: Sequence[CheckpointStatus]
    usage: UsageStatus
    """What the job has taken until now."""
    waiting_for: str
    """What the status says that the attempt waits for; empty where it waits for nothing."""
    final_result: Result | None
    """From the final report of the current attempt."""
    last_phase: str = ""
    """What the trainer was doing by its newest report of the current attempt; empty where it has not reported."""

    @property
    def held(self) -> bool:
        """Whether the attempt's queue holds it."""
        return self.child is not None and self.child.suspended


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


# ---- between two attempts ----


def _between(attempts: AttemptsStatus, world: World) -> Step:
    """No attempt exists: clear the old one away, wait for its pods, then end, rest, wait for the back-off or go on."""
    if world.child is not None and not world.child.deleting:
        return Step(attempts=attempts, next=Next.REMOVE, wait_seconds=1)
    waits = [seconds for pod in world.pods if (seconds := _seconds_until_gone(pod, world.now)) > 0]
    if world.child is not None:
        waits.append(1)
    if waits:
        return Step(attempts=attempts, next=Next.WATCH, wait_seconds=max(waits))
    if settled := _final(attempts, world):
        return Step(attempts=attempts, next=Next.SETTLE, settled=settled)
    if world.policy.suspend:
        return Step(attempts=attempts, next=Next.WATCH)
    if attempts.next_start_time is not None and attempts.next_start_time > world.now:
        left = (attempts.next_start_time - world.now).total_seconds()
        return Step(attempts=attempts, next=Next.WATCH, wait_seconds=left)
    return _open(attempts, world)


def _final(attempts: AttemptsStatus, world: World) -> Settlement | None:
    """Return why no attempt follows: what ended the last one, or what was ordered while none existed."""
    last = attempts.recent[-1] if attempts.recent else None
    if last is not None and last.verdict == Verdict.PERMANENT:
        message = messages.stopped(last.message, world.checkpoints[-1].uri if world.checkpoints else "")
        return Settlement(succeeded=False, reason=last.reason, message=message)
    if world.policy.cancel:
        message = messages.stopped(messages.CANCELLED, world.checkpoints[-1].uri if world.checkpoints else "")
        return Settlement(succeeded=False, reason=Reason.CANCELLED, message=message)
    if is_active_deadline_over(world.policy, world.usage.active_seconds):
        message = messages.active_deadline(world.policy.active_deadline_seconds or 0)
        return Settlement(succeeded=False, reason=Reason.DEADLINE_EXCEEDED, message=message)
    if attempts.started >= MOST_ATTEMPTS:  # names have room for three digits
        message = messages.most_attempts(MOST_ATTEMPTS)
        return Settlement(succeeded=False, reason=Reason.RETRIES_EXHAUSTED, message=message)
    return None


def _open(attempts: AttemptsStatus, world: World) -> Step:
    """Nothing of an older attempt is left and no back-off holds: number the next one.

    What must be known before any GPU is asked for is asked here.
    """
    number = attempts.started + 1
    current = CurrentAttempt(number=number, start_time=world.now, admitted_time=world.now)
    opened = attempts.model_copy(update={"started": number, "current": current, "next_start_time": None})
    return Step(attempts=opened, next=Next.OPEN)


def _seconds_until_gone(pod: PodObservation, now: datetime) -> float:
    """Return how long an old pod is waited for; 0 once it counts as gone."""
    if pod.delete_deadline is None:
        return 5  # its deletion has not begun: the garbage collector is on its way
    return max(0.0, (pod.delete_deadline + TERMINATING_LIMIT - now).total_seconds())


# ---- during an attempt ----


def _during(attempts: AttemptsStatus, current: CurrentAttempt, world: World) -> Step:
    """An attempt exists: record its pods, obey orders, judge the evidence, and close it once it has ended."""
    pods = own_pods(current, world)
    current = _seen(current, pods, world)
    ruling = judge(
        current=current,
        child=world.child,
        child_uid=world.child_uid,
        pods=pods,
        nodes=world.nodes,
        final_result=world.final_result,
        last_phase=world.last_phase,
    )
    if ruling is not None and ruling.verdict is Verdict.SUCCEEDED:
        settled = Settlement(succeeded=True, reason=ruling.reason, message=ruling.message, result=ruling.result)
        closed = close(attempts, current, cause_of(ruling, world.now), world.checkpoints, world.now)
        return Step(attempts=closed, next=Next.SETTLE, settled=settled)
    clocks = Clocks(
        now=world.now,
        active_seconds=world.usage.active_seconds,
        any_pod_runs=not world.held and any(pod.running for pod in pods),
        waiting_for=world.waiting_for,
    )
    if current.cause is None and (order := ordered_end(world.policy, current, clocks)):
        closed = close(attempts, current, cause_of(order, world.now), world.checkpoints, world.now)
        return Step(attempts=closed, next=Next.REMOVE, wait_seconds=0)
    if ruling is not None and stronger(current.cause, ruling):
        current = current.model_copy(update={"cause": cause_of(ruling, world.now)})
    attempts = attempts.model_copy(update={"current": current})
    if current.cause is not None:
        return _ending(attempts, current, current.cause, pods, world)
    never_created = world.child is None and not world.child_uid
    wait = seconds_to_deadline(world.policy, current, clocks)
    return Step(attempts=attempts, next=Next.CREATE if never_created else Next.WATCH, wait_seconds=wait)


def own_pods(current: CurrentAttempt, world: World) -> list[PodObservation]:
    """Return the attempt's pods; those that a suspension deleted which is over still end, and are none of them."""
    pods = [pod for pod in world.pods if pod.attempt == current.number]
    return [pod for pod in pods if not is_of_an_earlier_admission(pod, world.child)]


def _seen(current: CurrentAttempt, pods: Sequence[PodObservation], world: World) -> CurrentAttempt:
    """Return the attempt with what is seen of its pods. While a queue holds it, it has neither pods nor clocks."""
    if world.held:
        return current.model_copy(update={"pods": [], "admitted_time": None, "running_time": None})
    resumed_at = world.child.resumed_at if world.child is not None else None
    if resumed_at is not None and (current.admitted_time is None or resumed_at > current.admitted_time):
        # Admitted anew, perhaps without having been seen suspended: what was recorded is of the time before.
        current = current.model_copy(update={"pods": [], "admitted_time": resumed_at, "running_time": None})
    all_run = sum(pod.running or pod.ended for pod in pods) >= world.nodes
    return current.model_copy(
        update={
            "pods": _record(current.pods, pods),
            "admitted_time": current.admitted_time or world.now,
            "running_time": current.running_time or (world.now if all_run else None),
        }
    )


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
    closed = close(attempts, current, cause, world.checkpoints, world.now)
    if permanent:
        settled = Settlement(succeeded=False, reason=cause.reason, message=cause.message)
        return Step(attempts=closed, next=Next.SETTLE, settled=settled)
    if closed.charged > world.policy.max_retries or closed.started >= MOST_ATTEMPTS:
        message = messages.retries_exhausted(closed.charged, cause.message)
        settled = Settlement(succeeded=False, reason=Reason.RETRIES_EXHAUSTED, message=message)
        return Step(attempts=closed, next=Next.SETTLE, settled=settled)
    delay = backoff(closed, world.checkpoints)
    closed = closed.model_copy(update={"next_start_time": world.now + delay})
    return Step(attempts=closed, next=Next.REMOVE, wait_seconds=0)
