"""The life of attempts: when an attempt may start, what is recorded while it exists, and when it is closed.

Pure functions on `status.attempts`, called by `state_machine.py`. Before `reconcile.py` creates or deletes an object,
it writes the number of a new attempt, the cause of an attempt's end and changed counts into the status. So an operator
that restarts after a crash starts no attempt twice and counts none twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_core.api.conditions import Reason
from finetune_core.api.status import ATTEMPT_LIMIT, AttemptCause, AttemptsStatus, CurrentAttempt, PodRecord
from finetune_operator import messages
from finetune_operator.decide.accounting import LONGEST_BACKOFF_SECONDS, backoff, cause_of, close
from finetune_operator.decide.deadlines import is_active_deadline_over, seconds_of_pause, seconds_to_deadline
from finetune_operator.decide.decision import Action, Decision, JobEnd
from finetune_operator.decide.evidence import Evidence
from finetune_operator.decide.rules import judge
from finetune_operator.decide.states import JobState
from finetune_operator.decide.verdict import Ruling, Verdict, replaces
from finetune_operator.objects.observations import PodObservation
from finetune_operator.observe.observation import JobObservation

LEAVE_TOGETHER = timedelta(seconds=10)
"""How long at most an attempt stays open after the cause of its end was recorded. In this time the operator still
observes why the other pods of the attempt end."""
TERMINATING_LIMIT = timedelta(seconds=60)
"""The job no longer waits for a pod whose grace period ended this long ago, because the pod's kubelet counts as dead.

A trainer that still runs in such a pod does not damage the next attempt. Before each commit the trainer looks in the
bucket for a higher run number, and stops writing once the next attempt has taken a higher number. What the trainer
commits earlier is a normal checkpoint of the job.
"""
ORPHAN_LIMIT = timedelta(seconds=60)
"""Time after the end of an attempt at which the operator itself deletes pods that have no child object any more.

Normally the garbage collector deletes the pods of a deleted child within seconds. But the pods stay where somebody
deleted the child with `--cascade=orphan`.
"""
_ORPHAN_SECONDS = 5.0
"""Seconds until the next reconcile checks whether the garbage collector has begun to delete the pods of an ended
attempt."""
_DELETION_SECONDS = 1.0
"""Seconds after the deletion of an object until the next reconcile checks whether the object is gone."""


# ---- decisions while no attempt is current ----


def between_attempts(attempts: AttemptsStatus, seen: JobObservation) -> Decision:
    """Return the decision while no attempt is current.

    First the objects of the last attempt are removed, and the job waits until the pods of that attempt are gone. Then
    the job ends, is suspended, waits for its back-off, or gets its next attempt.
    """
    if seen.child is not None and not seen.child.deleting:
        return Decision(
            state=JobState.CLEANING_UP,
            attempts=attempts,
            action=Action.REMOVE_ATTEMPT,
            wait_seconds=_DELETION_SECONDS,
        )
    pods = [pod for pod in seen.pods if pod.uid not in seen.undeletable]
    orphans = [pod for pod in pods if pod.delete_deadline is None]
    if seen.child is None and orphans and _ended_long_ago(attempts, seen.now):
        return Decision(
            state=JobState.CLEANING_UP,
            attempts=attempts,
            action=Action.REMOVE_ORPHANS,
            wait_seconds=_DELETION_SECONDS,
            orphans=orphans,
        )
    waits = [seconds for pod in pods if (seconds := _seconds_until_gone(pod, seen.now)) > 0]
    if seen.child is not None:
        waits.append(_DELETION_SECONDS)
    if waits:
        return Decision(state=JobState.CLEANING_UP, attempts=attempts, wait_seconds=max(waits))
    if end := _end_between_attempts(attempts, seen):
        return Decision(state=JobState.FAILED, attempts=attempts, end=end)
    if seen.policy.suspend:
        return Decision(state=JobState.SUSPENDED, attempts=attempts)
    if (left := seconds_of_pause(attempts.next_start_time, seen.now, LONGEST_BACKOFF_SECONDS)) > 0:
        return Decision(state=JobState.BACKING_OFF, attempts=attempts, wait_seconds=left)
    return _open_next(attempts, seen)


def _end_between_attempts(attempts: AttemptsStatus, seen: JobObservation) -> JobEnd | None:
    """Return how the job ends where no further attempt may follow; None where one may follow.

    The job ends if the verdict of its last attempt is permanent, if it is cancelled, if its active deadline is over,
    or if it has had ATTEMPT_LIMIT attempts.
    """
    newest_checkpoint = seen.checkpoints[-1].uri if seen.checkpoints else ""
    last = attempts.recent[-1] if attempts.recent else None
    if last is not None and last.verdict == Verdict.PERMANENT:
        return _failed(last.reason, messages.stopped(last.message, newest_checkpoint))
    if seen.policy.cancel:
        return _failed(Reason.CANCELLED, messages.stopped(messages.CANCELLED, newest_checkpoint))
    if is_active_deadline_over(seen.policy, seen.usage.active_seconds):
        message = messages.active_deadline(seen.policy.active_deadline_seconds or 0)
        return _failed(Reason.DEADLINE_EXCEEDED, message)
    if attempts.started >= ATTEMPT_LIMIT:
        return _failed(Reason.RETRIES_EXHAUSTED, messages.most_attempts(ATTEMPT_LIMIT))
    return None


def _open_next(attempts: AttemptsStatus, seen: JobObservation) -> Decision:
    """Return the decision that records the next attempt, with its number, in the status."""
    number = attempts.started + 1
    current = CurrentAttempt(number=number, start_time=seen.now, admitted_time=seen.now)
    opened = attempts.model_copy(update={"started": number, "current": current, "next_start_time": None})
    return Decision(state=JobState.OPENED, attempts=opened, action=Action.OPEN_ATTEMPT)


def _ended_long_ago(attempts: AttemptsStatus, now: datetime) -> bool:
    """Return whether the last attempt ended so long ago that the garbage collector would have deleted its pods.

    The result is True also where no ended attempt is recorded.
    """
    return not attempts.recent or now - attempts.recent[-1].end_time >= ORPHAN_LIMIT


def _seconds_until_gone(pod: PodObservation, now: datetime) -> float:
    """Return for how many more seconds to wait for a pod of an ended attempt; 0 once the pod counts as gone."""
    if pod.delete_deadline is None:
        return _ORPHAN_SECONDS  # the garbage collector has not yet begun to delete this pod
    return max(0.0, (pod.delete_deadline - now + TERMINATING_LIMIT).total_seconds())


# ---- decisions while an attempt is current ----


def during_attempt(attempts: AttemptsStatus, current: CurrentAttempt, seen: JobObservation) -> Decision:
    """Return the decision while an attempt is current: create its objects and record its pods. Once a rule says that
    the attempt ends, record the cause, and close the attempt at once or after the wait of `_ending`."""
    pods = seen.pods_of(current)
    current = _with_observed_pods(current, pods, seen)
    ruling = judge(_evidence(attempts, current, pods, seen))
    if ruling is not None and ruling.result is not None:
        succeeded = ruling.verdict is Verdict.SUCCEEDED
        end = JobEnd(succeeded=succeeded, reason=ruling.reason, message=ruling.message, result=ruling.result)
        closed = close(attempts, current, cause_of(ruling, seen.now), seen.checkpoints, seen.now)
        return Decision(state=JobState.SUCCEEDED if succeeded else JobState.FAILED, attempts=closed, end=end)
    if ruling is not None and ruling.ordered:
        closed = close(attempts, current, cause_of(ruling, seen.now), seen.checkpoints, seen.now)
        return Decision(state=JobState.CLEANING_UP, attempts=closed)
    current = _with_cause(current, ruling, seen.now)
    attempts = attempts.model_copy(update={"current": current})
    if current.cause is not None:
        return _ending(attempts, current, current.cause, pods, seen)
    never_created = seen.child is None and not seen.child_uid
    return Decision(
        state=_state_of_attempt(current, seen, never_created=never_created),
        attempts=attempts,
        action=Action.CREATE_ATTEMPT if never_created else Action.NONE,
        wait_seconds=seconds_to_deadline(
            seen.policy,
            current,
            now=seen.now,
            active_seconds=seen.usage.active_seconds,
            any_pod_runs=not seen.held and any(pod.running for pod in pods),
        ),
    )


def _evidence(
    attempts: AttemptsStatus, current: CurrentAttempt, pods: Sequence[PodObservation], seen: JobObservation
) -> Evidence:
    return Evidence(
        current=current,
        child=seen.child,
        child_uid=seen.child_uid,
        pods=pods,
        nodes=seen.nodes,
        final_result=seen.final_result,
        last_phase=seen.last_phase,
        batch=seen.batch,
        charged=attempts.charged,
        halvings=attempts.memory_halvings,
        policy=seen.policy,
        now=seen.now,
        active_seconds=seen.usage.active_seconds,
        waiting_for=seen.waiting_for,
    )


def _state_of_attempt(current: CurrentAttempt, seen: JobObservation, *, never_created: bool) -> JobState:
    """Return the state of an attempt that goes on. ``never_created`` says whether its child was never created."""
    if never_created:
        return JobState.OPENED
    if seen.held:
        return JobState.HELD
    return JobState.RUNNING if current.running_time is not None else JobState.PENDING


def _with_cause(current: CurrentAttempt, ruling: Ruling | None, now: datetime) -> CurrentAttempt:
    """Return ``current`` with ``ruling`` as the cause of its end, where no cause or a weaker cause is recorded."""
    if ruling is None or not replaces(current.cause, ruling):
        return current
    return current.model_copy(update={"cause": cause_of(ruling, now)})


def _with_observed_pods(
    current: CurrentAttempt, pods: Sequence[PodObservation], seen: JobObservation
) -> CurrentAttempt:
    """Return ``current`` with records of its pods, and the times at which it was admitted and at which all pods ran.

    ``pods`` are the pods of the attempt. While the child is suspended, for example by a queue, the records of pods and
    the times are empty, so that no pending deadline runs.
    """
    if seen.held:
        return current.model_copy(update={"pods": [], "admitted_time": None, "running_time": None})
    resumed_at = seen.child.resumed_at if seen.child is not None else None
    if resumed_at is not None and (current.admitted_time is None or resumed_at > current.admitted_time):
        # The queue suspended the attempt and admitted it anew, perhaps before any reconcile saw the child suspended.
        # Pods and times are recorded anew, because the recorded values belong to the earlier admission.
        current = current.model_copy(update={"pods": [], "admitted_time": resumed_at, "running_time": None})
    all_ran = sum(pod.running or pod.ended for pod in pods) >= seen.nodes
    return current.model_copy(
        update={
            "pods": _pod_records(current.pods, pods),
            "admitted_time": current.admitted_time or seen.now,
            "running_time": current.running_time or (seen.now if all_ran else None),
        }
    )


def _pod_records(records: Sequence[PodRecord], pods: Sequence[PodObservation]) -> list[PodRecord]:
    """Return ``records``, and a record of each pod in ``pods`` whose worker index is not recorded yet.

    A record without a node gets the node of its pod once the scheduler has bound the pod to a node.
    """
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
    seen: JobObservation,
) -> Decision:
    """Return the decision once the cause of the attempt's end is recorded. ``pods`` are the pods of the attempt.

    The attempt is closed when all pods have ended, or when 10 s have passed since the cause was recorded. A permanent
    cause closes the attempt at once, because no later evidence can replace that cause.
    """
    permanent = cause.verdict == Verdict.PERMANENT
    # LEAVE_TOGETHER is subtracted from the time of this reconcile and not added to the time of the cause, because the
    # sum could exceed the largest time that a datetime can hold.
    left = seconds_of_pause(cause.time, seen.now - LEAVE_TOGETHER, LEAVE_TOGETHER.total_seconds())
    if not permanent and left > 0 and not all(pod.ended for pod in pods):
        return Decision(state=JobState.ENDING, attempts=attempts, wait_seconds=left)
    closed = close(attempts, current, cause, seen.checkpoints, seen.now)
    if permanent:
        # No action removes the child, so that its pods stay and their logs can be read.
        return Decision(state=JobState.FAILED, attempts=closed, end=_failed(cause.reason, cause.message))
    if closed.charged > seen.policy.max_retries or closed.started >= ATTEMPT_LIMIT:
        message = messages.retries_exhausted(closed.charged, cause.message)
        return Decision(state=JobState.FAILED, attempts=closed, end=_failed(Reason.RETRIES_EXHAUSTED, message))
    delay = backoff(closed, seen.checkpoints)
    closed = closed.model_copy(update={"next_start_time": seen.now + delay})
    return Decision(state=JobState.CLEANING_UP, attempts=closed)


def _failed(reason: str, message: str) -> JobEnd:
    return JobEnd(succeeded=False, reason=reason, message=message)
