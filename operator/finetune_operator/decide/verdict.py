"""Why an attempt ends: a pure function of what was seen of its pods and child.

First match decides: success; suspended by its queue (the attempt goes on); a permanent failure (64, 65, 66, OOMKilled);
a disruption that came before the first failure (free); any other failure (charged). Times have a resolution of one
second, so the caller judges at first sight of every change and keeps what was decided: see `stronger`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import Reason
from finetune_core.api.status import AttemptCause, CurrentAttempt
from finetune_core.contract import ExitCode, Outcome, Result
from finetune_operator import messages
from finetune_operator.objects.grace import TRAINING_GRACE_SECONDS
from finetune_operator.objects.observations import ChildObservation, ContainerState, PodObservation


class Verdict(StrEnum):
    """What the end of an attempt means for the job."""

    SUCCEEDED = "Succeeded"
    PERMANENT = "Permanent"
    """No other attempt follows: it would end the same way, or it was ordered so."""
    CHARGED = "Charged"
    """Counts against runPolicy.maxRetries."""
    FREE = "Free"
    """No fault of the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """The end of an attempt and who decided it."""

    verdict: Verdict
    reason: str
    message: str
    node: str = ""
    result: Result | None = None
    """With Succeeded: the result that names the artifact."""


_PERMANENT_REASONS = {
    ExitCode.BAD_INPUT: Reason.BAD_INPUT,
    ExitCode.DIVERGED: Reason.DIVERGED,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
}
"""In the order in which they decide among pods that failed together."""
_SIGNALLED = (137, ExitCode.STOPPED)
"""What a container ends with because it was killed or told to stop."""
RESUME_WINDOW = timedelta(seconds=TRAINING_GRACE_SECONDS + 30)
"""A child that fails this soon after its queue resumed it may have failed for the pods of its earlier admission."""
_LATE_CODES = (ExitCode.OUTSIDE_FAILURE, ExitCode.STOPPED)
"""Codes that a failing peer can cause: an unknown crash decides before 75, 75 before 143."""


def judge(
    *,
    current: CurrentAttempt,
    child: ChildObservation | None,
    child_uid: str,
    pods: Sequence[PodObservation],
    nodes: int,
    final_result: Result | None,
    last_phase: str = "",
) -> Ruling | None:
    """Return why the attempt ends, or None while it goes on.

    ``pods`` are the attempt's own; ``child_uid`` is what the status recorded (empty: never seen);
    ``final_result`` comes from the final report of this attempt, ``last_phase`` from the newest one (empty: none).
    """
    if success := _success(pods, nodes, final_result):
        return success
    if child is not None and child.suspended:
        # A queue took the attempt's place away: it gives it back, and the child stays as it is.
        return None
    failures = [pod for pod in pods if _failed_by_itself(pod)]
    if permanent := _permanent(failures, last_phase):
        return permanent
    if not failures and _resumed_too_early(child):
        return Ruling(verdict=Verdict.FREE, reason=Cause.RESUMED_TOO_EARLY, message=messages.RESUMED_TOO_EARLY)
    if disrupted := _disruption(current, child, child_uid, pods, failures, nodes):
        return disrupted
    if failures:
        return _charged(failures)
    if len(pods) == nodes and all(pod.ended for pod in pods):
        return Ruling(verdict=Verdict.CHARGED, reason=Cause.NO_ARTIFACT, message=messages.NO_ARTIFACT)
    if child is not None and child.finished and all(pod.ended for pod in pods):
        return Ruling(verdict=Verdict.CHARGED, reason=Cause.CHILD_FAILED, message=child.message or messages.NO_ARTIFACT)
    return None


def is_of_an_earlier_admission(pod: PodObservation, child: ChildObservation | None) -> bool:
    """Tell whether ``pod`` was deleted by a suspension that is over: it still ends, and is no evidence."""
    resumed = child.resumed_at if child is not None else None
    return resumed is not None and pod.delete_requested_at is not None and pod.delete_requested_at <= resumed


def _resumed_too_early(child: ChildObservation | None) -> bool:
    """Whether training-operator counted pods that its suspension deleted as failed (its restartPolicy is Never)."""
    if child is None or child.resumed_at is None or child.failed_at is None:
        return False
    return child.failed_at - child.resumed_at <= RESUME_WINDOW


def stronger(old: AttemptCause | None, ruling: Ruling) -> bool:
    """Tell whether ``ruling`` replaces the recorded cause.

    What was seen first stays, because later evidence is often its consequence. Two things still count: a
    permanent failure, and among charged failures the peer's crash that explains a 75 or 143.
    """
    if old is None:
        return True
    if ruling.verdict is Verdict.PERMANENT:
        return old.verdict != Verdict.PERMANENT
    consequence = (Cause.OUTSIDE_FAILURE, Cause.STOPPED)
    return old.reason in consequence and ruling.reason == Cause.CRASHED


def _success(pods: Sequence[PodObservation], nodes: int, final_result: Result | None) -> Ruling | None:
    """Every pod ended with 0 and a result names the artifact; the final report counts once no pod runs."""
    done = [pod for pod in pods if pod.container is not None and pod.container.exit_code == 0]
    if len(done) == nodes == len(pods):
        results = [pod.container.result for pod in sorted(done, key=lambda pod: pod.index) if pod.container]
        named = next((result for result in [*results, final_result] if _names_artifact(result)), None)
    elif not pods and _names_artifact(final_result):
        named = final_result
    else:
        return None
    if named is None or named.artifact is None:
        return None
    reason = Reason.EARLY_STOPPED if named.outcome is Outcome.EARLY_STOPPED else Reason.COMPLETED
    return Ruling(
        verdict=Verdict.SUCCEEDED,
        reason=reason,
        message=named.message or messages.completed(named.artifact.step, named.artifact.uri),
        result=named,
    )


def _names_artifact(result: Result | None) -> bool:
    return (
        result is not None
        and result.outcome in (Outcome.COMPLETED, Outcome.EARLY_STOPPED)
        and result.artifact is not None
    )


def _failed_by_itself(pod: PodObservation) -> bool:
    """Whether the pod failed before anybody disrupted it or asked for its deletion."""
    if not pod.ended:
        return False
    container = pod.container
    if container is None or container.state is not ContainerState.TERMINATED:
        undisturbed = not pod.disruption and pod.delete_requested_at is None
        return pod.phase == "Failed" and pod.reason != Cause.NODE_LOST and undisturbed
    if container.exit_code == 0:
        return False
    finished = container.finished_at
    disturbances = [time for time in (pod.delete_requested_at, pod.disrupted_at) if time is not None]
    if finished is None or not disturbances:
        return True
    # In the same second a disruption is the cause of a signal's exit code, and of a kill that it announced itself:
    # the kubelet sets the condition as it kills the container. Any other code is the pod's own.
    signalled = container.exit_code in _SIGNALLED or pod.disrupted_at == finished
    first = min(disturbances)
    return finished < first or (finished == first and not signalled)


def _permanent(failures: Sequence[PodObservation], last_phase: str) -> Ruling | None:
    for code, reason in _PERMANENT_REASONS.items():
        for pod in failures:
            container = pod.container
            if container is None:
                continue
            killed = container.reason == "OOMKilled" and code is ExitCode.OUT_OF_MEMORY
            if container.exit_code == code or killed:
                result = container.result
                fallback = messages.exit_sentence(container.exit_code, "")
                if killed:
                    fallback = messages.out_of_memory(pod.memory_limit, last_phase)
                return Ruling(
                    verdict=Verdict.PERMANENT,
                    reason=reason,
                    message=(result.message if result else "") or fallback,
                    node=pod.node,
                )
    return None


def _disruption(
    current: CurrentAttempt,
    child: ChildObservation | None,
    child_uid: str,
    pods: Sequence[PodObservation],
    failures: Sequence[PodObservation],
    nodes: int,
) -> Ruling | None:
    """Return what the cluster or a person did before the first failure of the attempt."""
    times = [_failed_at(pod) for pod in failures]
    first_failure = min((time for time in times if time is not None), default=None)
    told_to_stop = all(pod.container and pod.container.exit_code == ExitCode.STOPPED for pod in failures)
    # A backend that has not failed its object yet deletes none of its pods, and nobody leaves with 143 untold.
    deletion_wins = told_to_stop or (child is not None and not child.failed)

    def early(time: datetime | None) -> bool:
        if not failures:
            return True
        if first_failure is None or None in times:
            # The kubelet says that a pod was evicted before it says when its container ended.
            return deletion_wins
        return time is not None and (time < first_failure or (time == first_failure and deletion_wins))

    if not failures and (changed := _child_changed(child, child_uid, nodes)):
        return changed  # it is why the backend or the garbage collector deletes pods
    for pod in sorted(pods, key=_disturbed_first):
        if pod.disruption and early(pod.disrupted_at):
            message = messages.pod_disrupted(pod.name, pod.disruption)
            return Ruling(verdict=Verdict.FREE, reason=pod.disruption, message=message, node=pod.node)
        if pod.reason == Cause.NODE_LOST or pod.phase == "Unknown":
            message = messages.pod_disrupted(pod.name, Cause.NODE_LOST)
            return Ruling(verdict=Verdict.FREE, reason=Cause.NODE_LOST, message=message, node=pod.node)
        if pod.delete_requested_at and not _finished_before(pod) and early(pod.delete_requested_at):
            return _deleted(pod, current, _missing(current, pods))
    if failures:
        return None  # the backend's clean-up after the failure may have taken the missing pods
    return _missing(current, pods)


def _deleted(pod: PodObservation, current: CurrentAttempt, missing: Ruling | None) -> Ruling:
    """Return the ruling about a deleted pod, while recorded ones may be gone already.

    A pod that was deleted by force is gone at once, and training-operator, which saw its mark, deletes the ones that
    are left: then what is gone comes first, and the sentence says both.
    """
    message = messages.pod_deleted(pod.name)
    if missing is None:
        return Ruling(verdict=Verdict.FREE, reason=Cause.POD_DELETED, message=message, node=pod.node)
    is_recorded = any(record.uid == pod.uid for record in current.pods)
    return replace(missing, message=f"{missing.message}; {message}") if is_recorded else missing


def _missing(current: CurrentAttempt, pods: Sequence[PodObservation]) -> Ruling | None:
    """Return which recorded pods are gone or are others of the same name; all of them, since nothing tells any more
    which one somebody removed and which the backend removed after it."""
    present = {pod.index: pod.uid for pod in pods}
    gone = [record for record in current.pods if record.index not in present]
    if gone:
        message = messages.pods_vanished([record.name for record in gone])
        return Ruling(verdict=Verdict.FREE, reason=Cause.POD_VANISHED, message=message, node=gone[0].node)
    replaced = [record for record in current.pods if present[record.index] != record.uid]
    if replaced:
        message = messages.pods_replaced([record.name for record in replaced])
        return Ruling(verdict=Verdict.FREE, reason=Cause.POD_REPLACED, message=message, node=replaced[0].node)
    return None


def _disturbed_first(pod: PodObservation) -> tuple[bool, datetime, int]:
    """Order pods by when somebody first laid hands on them.

    training-operator deletes the others in the same second, a moment after it saw the first: then the version tells.
    """
    times = [time for time in (pod.disrupted_at, pod.delete_requested_at) if time is not None]
    return (not times, min(times, default=pod.created_at), pod.version)


def _failed_at(pod: PodObservation) -> datetime | None:
    return pod.container.finished_at if pod.container else None


def _finished_before(pod: PodObservation) -> bool:
    """Whether the pod had ended by itself before it was deleted: a clean-up, no evidence."""
    finished = _failed_at(pod)
    if finished is None or pod.delete_requested_at is None or pod.container is None:
        return False
    if pod.container.exit_code in _SIGNALLED:
        return finished < pod.delete_requested_at
    return finished <= pod.delete_requested_at


def _charged(failures: Sequence[PodObservation]) -> Ruling:
    """Return the failure that explains most: an unknown crash before 75 before 143, then the lowest index."""

    def rank(pod: PodObservation) -> tuple[int, int]:
        code = pod.container.exit_code if pod.container else None
        return (_LATE_CODES.index(ExitCode(code)) + 1 if code in _LATE_CODES else 0, pod.index)

    pod = min(failures, key=rank)
    container = pod.container
    if container is None or container.exit_code is None:
        message = messages.pod_failed(pod.name, pod.reason, pod.message)
        return Ruling(verdict=Verdict.CHARGED, reason=pod.reason or Cause.POD_FAILED, message=message, node=pod.node)
    reasons = {ExitCode.OUTSIDE_FAILURE: Cause.OUTSIDE_FAILURE, ExitCode.STOPPED: Cause.STOPPED}
    code = container.exit_code
    result = container.result
    message = (result.message if result else "") or messages.exit_sentence(code, container.reason)
    reason = reasons[ExitCode(code)] if code in _LATE_CODES else Cause.CRASHED
    if pod.reason == Cause.EVICTED:
        return Ruling(
            verdict=Verdict.CHARGED,
            reason=pod.reason,
            message=messages.pod_failed(pod.name, pod.reason, pod.message),
            node=pod.node,
        )
    return Ruling(verdict=Verdict.CHARGED, reason=reason, message=message, node=pod.node)


def _child_changed(child: ChildObservation | None, child_uid: str, nodes: int) -> Ruling | None:
    """Return what somebody else did to the backend's object."""
    if not child_uid:
        return None
    if child is None or child.deleting:
        return Ruling(verdict=Verdict.FREE, reason=Cause.CHILD_DELETED, message=messages.CHILD_DELETED)
    if child.uid != child_uid:
        return Ruling(verdict=Verdict.FREE, reason=Cause.CHILD_REPLACED, message=messages.CHILD_REPLACED)
    if child.replicas != nodes:
        message = messages.replicas_changed(child.replicas, nodes)
        return Ruling(verdict=Verdict.FREE, reason=Cause.CHILD_CHANGED, message=message)
    return None
