"""What is known about an attempt when `rules.py` asks whether it ends: its pods, its child object, orders and clocks.

Times have a resolution of one second in Kubernetes, and training-operator deletes the other pods after the first
failure. The properties here decide which of several pods that failed or were deleted was the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from functools import cached_property

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CurrentAttempt, PodRecord
from finetune_core.contract import ExitCode, Outcome, Result
from finetune_operator.objects.grace import TRAINING_GRACE_SECONDS
from finetune_operator.objects.observations import ChildObservation, ContainerState, PodObservation

_SIGNALLED = (137, ExitCode.STOPPED)
"""Exit codes of a container that was killed (137) or that obeyed SIGTERM (143)."""
_LATE_CODES = (ExitCode.OUTSIDE_FAILURE, ExitCode.STOPPED)
"""Exit codes that a failing peer can cause. A crash explains more than 75, and 75 explains more than 143."""
RESUME_WINDOW = timedelta(seconds=TRAINING_GRACE_SECONDS + 30)
"""A child that fails this soon after its queue resumed it may have failed for the pods of its earlier admission."""


class Disturbance(Enum):
    """What somebody outside the job did to a pod."""

    DISRUPTED = auto()
    """The pod has the condition DisruptionTarget: a drain, a preemption, a taint, or the kubelet."""
    NODE_LOST = auto()
    """The pod's node no longer answers."""
    DELETED = auto()
    """Somebody asked for the pod's deletion."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything from which a rule decides whether an attempt ends."""

    current: CurrentAttempt
    """The attempt as recorded, with the first pod that was seen for each index."""
    child: ChildObservation | None
    child_uid: str
    """Uid that the status recorded for the child; empty where none was seen yet."""
    pods: Sequence[PodObservation]
    """Pods of this attempt only."""
    nodes: int
    """Number of pods that the attempt needs."""
    final_result: Result | None
    """The trainer's result from its final report, which arrives also where the pods are gone; None without one."""
    last_phase: str = ""
    """Phase of the trainer in its newest report, for example "Training"; empty without a report."""
    policy: RunPolicySpec
    now: datetime
    active_seconds: int = 0
    """Seconds with a running pod, over all attempts."""
    waiting_for: str = ""
    """Why the attempt's pods do not all run; empty where they do."""

    @cached_property
    def failures(self) -> Sequence[PodObservation]:
        """Pods that failed before anybody disrupted them or asked for their deletion."""
        return [pod for pod in self.pods if _failed_by_itself(pod)]

    @cached_property
    def decisive_failure(self) -> PodObservation | None:
        """The failed pod that explains most: a crash before 75 before 143, then the lowest index."""

        def rank(pod: PodObservation) -> tuple[int, int]:
            code = pod.container.exit_code if pod.container else None
            return (_LATE_CODES.index(ExitCode(code)) + 1 if code in _LATE_CODES else 0, pod.index)

        return min(self.failures, key=rank, default=None)

    @cached_property
    def disturbance(self) -> tuple[Disturbance, PodObservation] | None:
        """What was done first to a pod from outside, where that came before the attempt's first failure."""
        for pod in sorted(self.pods, key=_disturbed_first):
            if pod.disruption and self._precedes_failures(pod.disrupted_at):
                return Disturbance.DISRUPTED, pod
            if pod.reason == Cause.NODE_LOST or pod.phase == "Unknown":
                return Disturbance.NODE_LOST, pod
            deleted = pod.delete_requested_at is not None and not _ended_before_deletion(pod)
            if deleted and self._precedes_failures(pod.delete_requested_at):
                return Disturbance.DELETED, pod
        return None

    def _precedes_failures(self, time: datetime | None) -> bool:
        """Return whether something that was done at ``time`` came before every failure of the attempt."""
        if not self.failures:
            return True
        all_stopped = all(pod.container and pod.container.exit_code == ExitCode.STOPPED for pod in self.failures)
        # A backend that has not failed its object has deleted no pod, and a trainer exits with 143 only after SIGTERM.
        deletion_came_first = all_stopped or (self.child is not None and not self.child.failed)
        times = [finished_at(pod) for pod in self.failures]
        first_failure = min((time for time in times if time is not None), default=None)
        if first_failure is None or None in times:
            # The kubelet reports that a pod was evicted before it reports when the pod's container ended.
            return deletion_came_first
        return time is not None and (time < first_failure or (time == first_failure and deletion_came_first))

    @property
    def vanished(self) -> Sequence[PodRecord]:
        """Recorded pods that no longer exist."""
        present = {pod.index for pod in self.pods}
        return [record for record in self.current.pods if record.index not in present]

    @property
    def replaced(self) -> Sequence[PodRecord]:
        """Recorded pods in whose place another pod of the same name exists."""
        present = {pod.index: pod.uid for pod in self.pods}
        return [record for record in self.current.pods if present.get(record.index, record.uid) != record.uid]

    @property
    def resumed_too_early(self) -> bool:
        """Whether training-operator failed the child for pods that the earlier suspension of the child had deleted.

        The pods' restartPolicy is Never, so training-operator counts a pod with a deletionTimestamp as failed.
        """
        child = self.child
        if child is None or child.resumed_at is None or child.failed_at is None:
            return False
        return child.failed_at - child.resumed_at <= RESUME_WINDOW

    @property
    def artifact_result(self) -> Result | None:
        """The result that names the committed artifact, once every pod ended with 0 or no pod exists any more."""
        done = [pod for pod in self.pods if pod.container is not None and pod.container.exit_code == 0]
        if len(done) == self.nodes == len(self.pods):
            results = [pod.container.result for pod in sorted(done, key=lambda pod: pod.index) if pod.container]
            return next((result for result in [*results, self.final_result] if _names_artifact(result)), None)
        return self.final_result if not self.pods and _names_artifact(self.final_result) else None


def finished_at(pod: PodObservation) -> datetime | None:
    """Return when the pod's training container ended; None while it runs or where the kubelet does not say."""
    return pod.container.finished_at if pod.container else None


def _names_artifact(result: Result | None) -> bool:
    return (
        result is not None
        and result.outcome in (Outcome.COMPLETED, Outcome.EARLY_STOPPED)
        and result.artifact is not None
    )


def _failed_by_itself(pod: PodObservation) -> bool:
    """Return whether the pod failed before anybody disrupted it or asked for its deletion."""
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
    # Where both fall into one second, a disruption explains the exit code of a signal. The kubelet sets its own
    # DisruptionTarget condition in the second in which it kills the container, whatever the exit code is.
    signalled = container.exit_code in _SIGNALLED or pod.disrupted_at == finished
    first = min(disturbances)
    return finished < first or (finished == first and not signalled)


def _disturbed_first(pod: PodObservation) -> tuple[bool, datetime, int]:
    """Return a key that sorts pods by when they were first disrupted or deleted.

    training-operator deletes the other pods in the same second as the first, a moment later. The pod with the lower
    resourceVersion was therefore deleted by somebody else.
    """
    times = [time for time in (pod.disrupted_at, pod.delete_requested_at) if time is not None]
    return (not times, min(times, default=pod.created_at), pod.version)


def _ended_before_deletion(pod: PodObservation) -> bool:
    """Return whether the pod had ended by itself before its deletion, which then was only a clean-up."""
    finished = finished_at(pod)
    if finished is None or pod.delete_requested_at is None or pod.container is None:
        return False
    if pod.container.exit_code in _SIGNALLED:
        return finished < pod.delete_requested_at
    return finished <= pod.delete_requested_at
