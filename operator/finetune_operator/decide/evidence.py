"""What is known about an attempt when `rules.py` asks whether it ends: its pods, its child object, its job's policy.

The properties here find out what came first where several pods failed or were deleted. The times alone do not show the
order, because Kubernetes stores times in whole seconds, and training-operator deletes the other pods right after the
first failure.
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
from finetune_operator.objects.observations import POD_DEADLINE, ChildObservation, ContainerState, PodObservation
from finetune_operator.observe.observation import BatchObservation

_SIGNALLED = (137, ExitCode.STOPPED)
"""Exit codes of a container that was killed (137) or that obeyed SIGTERM (143)."""
_LATE_CODES = (ExitCode.OUTSIDE_FAILURE, ExitCode.STOPPED)
"""Exit codes that may be no more than a consequence of another pod's failure: 75 and 143. Every other exit code
explains more than 75, and 75 explains more than 143."""
RESUME_WINDOW = timedelta(seconds=TRAINING_GRACE_SECONDS + 30)
"""Time after the queue resumed a child object. If the child fails within this time, the reason may be that pods of the
child's earlier admission were still ending, and the job need not be at fault."""


START_PATIENCE_SECONDS = 120.0
"""Seconds for which a kubelet may try again to create a container that its runtime refuses, before the attempt ends.
The kubelet itself never gives up, and no other node is tried."""
KUBELET_KILLS = frozenset({"Preempting", "NodeShutdown", "Shutdown", "Terminated"})
"""Values of `status.reason` of a pod that the kubelet killed, whether its container ran or not. The kubelet does so to
make room for a critical pod (`pkg/kubelet/preemption/preemption.go`), or because the node shuts down
(`pkg/kubelet/nodeshutdown`; Shutdown until Kubernetes 1.21). Newer kubelets also write the condition DisruptionTarget;
the rule about that condition then decides, because it is asked earlier."""


class Disturbance(Enum):
    """What happened to a pod from outside of the job."""

    DISRUPTED = auto()
    """The pod has the condition DisruptionTarget, for example because of a drain, a preemption or a taint."""
    NODE_LOST = auto()
    """The pod's node no longer answers."""
    DELETED = auto()
    """Somebody asked for the pod's deletion."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything from which the rules in `rules.py` decide whether an attempt ends."""

    current: CurrentAttempt
    """The attempt as recorded, with the first pod that was seen for each index."""
    child: ChildObservation | None
    child_uid: str
    """Uid of the child as recorded in the status; empty where no child was seen yet."""
    pods: Sequence[PodObservation]
    """Pods of this attempt only."""
    nodes: int
    """Number of pods that the attempt needs."""
    final_result: Result | None
    """The trainer's result from its final report, which is known even where the pods are gone. None where no final
    report has arrived."""
    last_phase: str = ""
    """Phase of the trainer in its newest report, for example "Training"; empty without a report."""
    batch: BatchObservation | None = None
    """How the spec lets a process compute its share of a global batch; None where this version can't read the spec."""
    charged: int = 0
    """How many earlier attempts count against `runPolicy.maxRetries`."""
    halvings: int = 0
    """How many earlier attempts ran out of memory and were followed by one with half the micro-batch."""
    policy: RunPolicySpec
    now: datetime
    active_seconds: int = 0
    """Seconds in which at least one pod of the job ran, over all attempts."""
    waiting_for: str = ""
    """What the attempt waits for, as a sentence: pods that do not run yet, or its first report. Empty if not known."""

    @cached_property
    def failures(self) -> Sequence[PodObservation]:
        """Pods that failed before anybody disrupted them or asked for their deletion."""
        return [pod for pod in self.pods if _failed_by_itself(pod)]

    @cached_property
    def decisive_failure(self) -> PodObservation | None:
        """The failed pod whose end explains most (see _LATE_CODES); None where no pod failed.

        Of several such pods, the pod with the lowest index is returned. The exit code of an evicted pod does not count,
        because the kubelet has ended that pod. An eviction explains more than exit code 75, and so does a failure
        without an exit code.
        """

        def rank(pod: PodObservation) -> tuple[int, int]:
            code = pod.container.exit_code if pod.container and pod.reason != Cause.EVICTED else None
            return (_LATE_CODES.index(ExitCode(code)) + 1 if code in _LATE_CODES else 0, pod.index)

        return min(self.failures, key=rank, default=None)

    @cached_property
    def lost(self) -> PodObservation | None:
        """The pod whose node lost the container, for example in a restart of the node; None if there is none.

        An evicted pod does not count, although its container looks lost too: the kubelet itself removed the container.
        """
        return next(
            (
                pod
                for pod in self.failures
                if pod.reason != Cause.EVICTED and pod.container is not None and pod.container.was_lost
            ),
            None,
        )

    @cached_property
    def refused(self) -> PodObservation | None:
        """The pod that its node did not start, or that the kubelet killed for the node's own sake; None if none.

        Of several such pods, the pod with the lowest index is returned. A pod that has not failed counts too, once its
        container runtime has refused to create the container for START_PATIENCE_SECONDS, unless somebody disrupted or
        deleted the pod.
        """
        stuck = [
            pod
            for pod in self.pods
            if pod.start_error_seconds >= START_PATIENCE_SECONDS
            and not pod.disruption
            and pod.delete_requested_at is None
        ]
        refused = [*(pod for pod in self.failures if is_refused(pod)), *stuck]
        return min(refused, key=lambda pod: pod.index, default=None)

    @cached_property
    def broken_node(self) -> PodObservation | None:
        """The pod whose trainer says that a GPU or the driver of its node is broken; None if none. Of several such
        pods, the pod with the lowest index is returned."""
        broken = [
            pod
            for pod in self.failures
            if pod.container and pod.container.result is not None and pod.container.result.node_fault
        ]
        return min(broken, key=lambda pod: pod.index, default=None)

    @cached_property
    def disturbance(self) -> tuple[Disturbance, PodObservation] | None:
        """The first disturbance of a pod and the pod itself; None where no disturbance came before the first failure.

        The loss of a node counts even after a failure.
        """
        for pod in sorted(self.pods, key=_disturbed_first):
            if pod.disruption and self._precedes_failures(pod.disrupted_at):
                return Disturbance.DISRUPTED, pod
            if pod.reason == Cause.NODE_LOST or pod.phase == "Unknown":
                return Disturbance.NODE_LOST, pod
            deleted = pod.delete_requested_at is not None and not _ended_before_deletion(pod)
            if deleted and self._precedes_failures(pod.delete_requested_at):
                return Disturbance.DELETED, pod
        return None

    @cached_property
    def deleted_together(self) -> Sequence[PodObservation]:
        """The other pods, by index, that were deleted in the same second as the pod of `disturbance`. Any of them may
        have been deleted before that pod.

        The order of the resourceVersions (see `_disturbed_first`) is no proof, because the kubelet writes the status of
        a deleted pod once more: from Kubernetes 1.34 on (`status.observedGeneration`) before its containers end too.
        """
        if self.disturbance is None:
            return []
        second = self.disturbance[1].delete_requested_at
        together = [pod for pod in self.pods if pod.delete_requested_at == second is not None]
        return sorted((pod for pod in together if pod is not self.disturbance[1]), key=lambda pod: pod.index)

    def _precedes_failures(self, time: datetime | None) -> bool:
        """Return whether a disruption or deletion at ``time`` came before every failure of the attempt."""
        if not self.failures:
            return True
        all_stopped = all(_stopped(pod) for pod in self.failures)
        # Where deletion and failure fall into the same second, the deletion came first in two cases: all failed pods
        # exited with 143, which a trainer does only after SIGTERM, or the child has not failed, so that the backend
        # itself has deleted no pod because of a failure.
        deletion_came_first = all_stopped or (self.child is not None and not self.child.failed)
        times = [finished_at(pod) for pod in self.failures]
        first_failure = min((time for time in times if time is not None), default=None)
        # No field gives the time of an eviction, and the evicted container ends some time later. So a deletion before
        # the end of the container may still have come after the eviction.
        evicted = any(pod.reason == Cause.EVICTED for pod in self.failures)
        if first_failure is None or None in times or (evicted and time is not None and time < first_failure):
            return deletion_came_first
        return time is not None and (time < first_failure or (time == first_failure and deletion_came_first))

    @property
    def vanished(self) -> Sequence[PodRecord]:
        """Pods that the status records for the attempt but that no longer exist."""
        present = {pod.index for pod in self.pods}
        return [record for record in self.current.pods if record.index not in present]

    @property
    def replaced(self) -> Sequence[PodRecord]:
        """Pods that the status records for the attempt but in whose place another pod with another uid exists."""
        present = {pod.index: pod.uid for pod in self.pods}
        return [record for record in self.current.pods if present.get(record.index, record.uid) != record.uid]

    @property
    def resumed_too_early(self) -> bool:
        """Whether pods of the earlier admission explain the child's failure, because it failed soon after a resume.

        The suspension deleted those pods. training-operator counts a pod with a deletionTimestamp as failed, because
        the pods' restartPolicy is Never.
        """
        child = self.child
        if child is None or child.resumed_at is None or child.failed_at is None:
            return False
        return child.failed_at - child.resumed_at <= RESUME_WINDOW

    @property
    def artifact_result(self) -> Result | None:
        """The trainer's result that names the committed artifact, once every pod ended with exit code 0 or no pod is
        left.

        The value is None before, and where no result names an artifact.
        """
        done = [pod for pod in self.pods if pod.container is not None and pod.container.exit_code == 0]
        if len(done) == self.nodes == len(self.pods):
            results = [pod.container.result for pod in sorted(done, key=lambda pod: pod.index) if pod.container]
            return next((result for result in [*results, self.final_result] if _names_artifact(result)), None)
        return self.final_result if not self.pods and _names_artifact(self.final_result) else None


def finished_at(pod: PodObservation) -> datetime | None:
    """Return when the pod's training container ended; None while it runs or where the kubelet does not say."""
    return pod.container.finished_at if pod.container else None


def _stopped(pod: PodObservation) -> bool:
    """Return whether the trainer in ``pod`` ended with exit code 143, which it has only after SIGTERM, and no eviction
    caused the SIGTERM."""
    return _signalled(pod) and pod.container is not None and pod.container.exit_code == ExitCode.STOPPED


def is_refused(pod: PodObservation) -> bool:
    """Return whether ``pod`` failed because its kubelet refused or killed it, or because the runtime did not start it.

    Every admission handler of the kubelet may refuse a pod with a reason of its own, and new versions of the kubelet
    add handlers. So a refusal is recognised by what all refusals have in common (`rejectPod` in
    `pkg/kubelet/kubelet.go`): the pod has a reason, and its container never ran.
    """
    container = pod.container
    if container is not None and container.never_ran:
        # The phase need not be Failed yet: the kubelet writes Failed only once nothing of the pod is left on the node.
        return True
    if pod.phase != "Failed":
        return False
    if pod.reason in KUBELET_KILLS:
        return True
    if container is not None and container.state is not ContainerState.WAITING:
        return False
    if pod.reason == Cause.EVICTED:
        # The status of a pod that the kubelet refused because of the node's own pressure lists no containers. The
        # status of a pod that the kubelet evicted later lists the containers.
        return container is None
    return pod.reason not in ("", POD_DEADLINE)


def _names_artifact(result: Result | None) -> bool:
    return (
        result is not None
        and result.outcome in (Outcome.COMPLETED, Outcome.EARLY_STOPPED, Outcome.GATE_FAILED)
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
    # Where the container ended in the same second in which a disturbance happened, the disturbance is taken to explain
    # the exit codes of signals, 137 and 143. A disruption even explains any exit code, because the kubelet sets its own
    # DisruptionTarget condition in the second in which it kills the container.
    signalled = _signalled(pod) or pod.disrupted_at == finished
    first = min(disturbances)
    return finished < first or (finished == first and not signalled)


def _signalled(pod: PodObservation) -> bool:
    """Return whether the container of ``pod`` was killed or obeyed SIGTERM, and no eviction explains this."""
    return pod.container is not None and pod.container.exit_code in _SIGNALLED and pod.reason != Cause.EVICTED


def _disturbed_first(pod: PodObservation) -> tuple[bool, datetime, bool, int]:
    """Return a sort key: the pod that was disrupted or deleted first comes first, undisturbed pods come last.

    After somebody deleted a pod, or the cluster disrupted it, training-operator deletes the other pods a moment later,
    often in the same second. So within one second a disrupted pod comes before deleted ones. Of several deleted pods
    the one with the lowest resourceVersion comes first, because that pod was changed first and so is the pod that
    somebody else deleted.
    """
    times = [time for time in (pod.disrupted_at, pod.delete_requested_at) if time is not None]
    return (not times, min(times, default=pod.created_at), not pod.disruption, pod.version)


def _ended_before_deletion(pod: PodObservation) -> bool:
    """Return whether the pod had ended by itself before it was deleted, so that the deletion was only a clean-up."""
    finished = finished_at(pod)
    if finished is None or pod.delete_requested_at is None or pod.container is None:
        return False
    if _signalled(pod):
        return finished < pod.delete_requested_at
    return finished <= pod.delete_requested_at
