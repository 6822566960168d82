"""Pods and child objects as immutable values, and the functions that parse pods into such values.

`observe/`, `act/` and the backends parse what the API server sends. `decide/` and `status/` compute verdicts,
conditions and messages from these values and never from manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from finetune_core.contract import Result
from finetune_operator.objects.labels import ATTEMPT, LAST_CHECKPOINT_TIME, PREFLIGHT, REPLICA_INDEX, TRAINING_CONTAINER


class ContainerState(StrEnum):
    """State of the training container: `waiting`, `running` or `terminated` in the pod's `status.containerStatuses`."""

    WAITING = "Waiting"
    RUNNING = "Running"
    TERMINATED = "Terminated"


POD_DEADLINE = "DeadlineExceeded"
"""`status.reason` of a pod that reached its own `activeDeadlineSeconds` (`pkg/kubelet/active_deadline.go`)."""
START_ERRORS = frozenset(
    {
        "StartError",
        "ContainerCannotRun",
        "RunContainerError",
        "PreCreateHookError",
        "CreateContainerError",
        "PreStartHookError",
    }
)
"""Reasons of a container that its runtime could not start. containerd writes StartError (exit code 128, in
`container_start.go` of its CRI server) and cri-dockerd ContainerCannotRun. The others are errors of the kubelet, from
`pkg/kubelet/container/sync_result.go` and `pkg/kubelet/kuberuntime/kuberuntime_container.go` of Kubernetes 1.34."""


EARLIEST, LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
"""Limits of the times that are read from objects. An earlier or later time is replaced by the nearest limit, so that
sums with a duration and conversions to another time zone stay within the range of datetime."""
NUMBER_DIGITS = 19
"""Largest number of digits of a text that is read as a whole number. No number of the Kubernetes API has more."""
LONGEST_GRACE_SECONDS = 10 * 365 * 24 * 3600
"""Longest grace period in seconds that the operator believes. Anybody may delete their own pod with a grace period of a
trillion seconds, and the subtraction of so many seconds would leave the range of datetime."""
LOST_CONTAINERS = frozenset({"Unknown", "ContainerStatusUnknown"})
"""Reasons of a container whose end nobody saw. containerd writes Unknown (exit code 255) for a container that has no
process when containerd starts. The kubelet writes ContainerStatusUnknown (137) for a container that its runtime no
longer has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerObservation:
    """The training container (named `pytorch`) of a pod."""

    state: ContainerState
    reason: str = ""
    """Reason of the state, for example ``"ErrImagePull"`` while waiting or ``"OOMKilled"`` after the end."""
    message: str = ""
    """Message of the waiting state, or the termination message of an ended container."""
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image_id: str = ""
    """Image that the node runs: `repository@sha256:...`, or only a digest where the image came from no registry."""

    @property
    def never_ran(self) -> bool:
        """Whether the container has ended without ever having run, because the container runtime could not start it.

        A runtime gives times as numbers. For a start that did not happen most runtimes give 0, which the kubelet shows
        as the year 1970. For runtimes that give another number, the reason shows that the container never ran.
        """
        if self.state is not ContainerState.TERMINATED:
            return False
        return self.reason in START_ERRORS or (self.started_at is not None and self.started_at.timestamp() <= 0)

    @property
    def was_lost(self) -> bool:
        """Whether the container ended without anybody knowing how, for example because its node restarted."""
        return self.state is ContainerState.TERMINATED and self.reason in LOST_CONTAINERS

    @property
    def waits_for_runtime(self) -> bool:
        """Whether the kubelet tries again and again to create the container, and the container runtime refuses."""
        return self.state is ContainerState.WAITING and self.reason in START_ERRORS

    @property
    def result(self) -> Result | None:
        """The result that the trainer wrote as termination message.

        None where the container has not ended, or where the termination message is no result.
        """
        return Result.from_termination_message(self.message) if self.state is ContainerState.TERMINATED else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PodObservation:
    """A pod of an attempt or of a preflight check. A field without a value in the manifest has its default."""

    name: str
    uid: str
    attempt: int
    index: int
    """Index of the worker, from 0; of a preflight pod, the number of the try."""
    phase: str = "Pending"
    reason: str = ""
    """`status.reason` of the pod, for example ``"Evicted"`` in the phase Failed."""
    message: str = ""
    node: str = ""
    version: int = 0
    """`metadata.resourceVersion` as a number. Of two pods, the pod that changed later has the higher number."""
    created_at: datetime
    scheduled_at: datetime | None = None
    """When the scheduler bound the pod to a node. From then on the pod holds its GPUs."""
    delete_requested_at: datetime | None = None
    """When the deletion was requested: `metadata.deletionTimestamp` minus the grace period. Where that period is 0, the
    time is at the latest the end of the training container (see `_delete_requested_at`)."""
    delete_deadline: datetime | None = None
    """`metadata.deletionTimestamp`, which is the end of the grace period."""
    disruption: str = ""
    """Reason of the DisruptionTarget condition, for example ``"PreemptionByScheduler"``; empty where there is none."""
    disrupted_at: datetime | None = None
    unschedulable: str = ""
    """Message of the PodScheduled condition while the scheduler finds no node, for example ``"0/4 nodes ..."``."""
    container: ContainerObservation | None = None
    start_error_seconds: float = 0.0
    """For how many seconds the operator has seen the container wait with an error of its runtime (`START_ERRORS`)."""
    memory_limit: str = ""
    """Memory limit of the training container as the pod's spec has it, for example ``"64Gi"``."""
    checkpoint_time: str = ""
    """Value of the annotation `volcano.sh/last-checkpoint-time`; empty where the pod has no such annotation."""

    @property
    def ended(self) -> bool:
        """Whether the training container has ended. Sidecars of the pod may still run."""
        if self.container is not None and self.container.state is ContainerState.TERMINATED:
            return True
        return self.phase in ("Failed", "Succeeded")

    @property
    def running(self) -> bool:
        """Whether the training container runs."""
        return self.container is not None and self.container.state is ContainerState.RUNNING

    @property
    def ended_at(self) -> datetime | None:
        """When the training container ended; None while it runs, or where the manifest does not give the time."""
        return self.container.finished_at if self.container is not None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildObservation:
    """What every backend can say about the child object of an attempt, for example about a PyTorchJob."""

    name: str
    uid: str
    owner_uid: str
    deleting: bool = False
    suspended: bool = False
    """Whether the child is suspended, for example by Kueue. Right after a resume this is still True, until the
    backend's controller has acted on the resume."""
    resumed_at: datetime | None = None
    """When the backend last resumed the child after a suspension; None where the backend has never resumed the child,
    or has suspended the child again since."""
    failed_at: datetime | None = None
    replicas: int
    """Number of workers in the child's spec."""
    succeeded: bool = False
    failed: bool = False
    message: str = ""
    """Message of the condition with which the backend marked the child as failed or succeeded."""

    @property
    def finished(self) -> bool:
        """Whether the child has succeeded or failed. The backend then starts nothing more for the child."""
        return self.succeeded or self.failed


def parse_time(text: str | None) -> datetime | None:
    """Return ``text``, for example ``"2026-01-31T12:00:00Z"`` (RFC 3339), as a datetime.

    Returns None where ``text`` is empty or is not such a time. A time before `EARLIEST` or after `LATEST` is replaced
    by that limit. Whoever may write the status of an object may write any time that the API server accepts, for example
    a time in the year 0, or a time in a zone that differs from UTC by 99 hours.
    """
    try:
        time = datetime.fromisoformat(text.upper()) if text else None
    except ValueError:
        return None
    return None if time is None or time.tzinfo is None else min(max(time, EARLIEST), LATEST)


def whole_number(text: str) -> int | None:
    """Return the whole number that ``text`` consists of; None where ``text`` is anything but 1 to 19 ASCII digits.

    The texts that the operator reads as numbers are labels, names and stored values, which other people can write.
    `int` accepts digits of all scripts, and raises an error for a text of thousands of digits.
    """
    return int(text) if len(text) <= NUMBER_DIGITS and text.isascii() and text.isdigit() else None


def parse_pod(pod: Mapping[str, Any]) -> PodObservation | None:
    """Return the observation of a pod of an attempt; None where the labels of ``pod`` name no attempt and index."""
    labels = pod["metadata"].get("labels", {})
    attempt, index = whole_number(labels.get(ATTEMPT, "")), whole_number(labels.get(REPLICA_INDEX, ""))
    return _observation(pod, attempt, index) if attempt is not None and index is not None else None


def parse_preflight_pod(pod: Mapping[str, Any]) -> PodObservation | None:
    """Return the observation of a preflight pod; None where ``pod`` is not a preflight pod.

    In the observation, `attempt` is 0 and `index` is the number of the try.
    """
    number = whole_number(pod["metadata"].get("labels", {}).get(PREFLIGHT, ""))
    return _observation(pod, 0, number) if number is not None else None


def _observation(pod: Mapping[str, Any], attempt: int, index: int) -> PodObservation:
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    disruption = conditions.get("DisruptionTarget", {})
    disrupted = disruption.get("status") == "True"
    scheduled = conditions.get("PodScheduled", {})
    deadline = parse_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=min(metadata.get("deletionGracePeriodSeconds") or 0, LONGEST_GRACE_SECONDS))
    container = _parse_container(status.get("containerStatuses", []))
    return PodObservation(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt,
        index=index,
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        node=spec.get("nodeName", ""),
        version=whole_number(metadata.get("resourceVersion", "")) or 0,
        created_at=parse_time(metadata["creationTimestamp"]) or EARLIEST,
        scheduled_at=parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        delete_requested_at=_delete_requested_at(deadline, grace, container),
        delete_deadline=deadline,
        disruption=disruption.get("reason", "") or "DisruptionTarget" if disrupted else "",
        disrupted_at=parse_time(disruption.get("lastTransitionTime")) if disrupted else None,
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        container=container,
        memory_limit=_memory_limit(spec.get("containers", [])),
        checkpoint_time=metadata.get("annotations", {}).get(LAST_CHECKPOINT_TIME, ""),
    )


def _delete_requested_at(
    deadline: datetime | None, grace: timedelta, container: ContainerObservation | None
) -> datetime | None:
    """Return when the deletion of a pod was requested; None where nobody has requested it.

    Once the containers have ended, the kubelet removes the pod: it sets the grace period to 0 and `deadline` to the
    present time, so that the time of the request is lost. A request that made the container end came no later than the
    end. Without this limit, such a container would seem to have ended before anybody asked for it.
    """
    if deadline is None:
        return None
    finished = container.finished_at if container is not None else None
    return min(deadline, finished) if not grace and finished is not None else deadline - grace


def _memory_limit(containers: list[Mapping[str, Any]]) -> str:
    training = next((container for container in containers if container["name"] == TRAINING_CONTAINER), {})
    return str(training.get("resources", {}).get("limits", {}).get("memory", ""))


def _parse_container(statuses: list[Mapping[str, Any]]) -> ContainerObservation | None:
    status = next((status for status in statuses if status["name"] == TRAINING_CONTAINER), None)
    if status is None or not status.get("state"):
        return None
    state, image_id = status["state"], status.get("imageID", "")
    if end := state.get("terminated"):
        return ContainerObservation(
            state=ContainerState.TERMINATED,
            reason=end.get("reason", ""),
            message=end.get("message", ""),
            exit_code=end["exitCode"],
            started_at=parse_time(end.get("startedAt")),
            finished_at=parse_time(end.get("finishedAt")),
            image_id=image_id,
        )
    if (running := state.get("running")) is not None:
        started = parse_time(running.get("startedAt"))
        return ContainerObservation(state=ContainerState.RUNNING, started_at=started, image_id=image_id)
    waiting = state.get("waiting") or {}
    return ContainerObservation(
        state=ContainerState.WAITING, reason=waiting.get("reason", ""), message=waiting.get("message", "")
    )


def controller_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the owner reference with `controller: true`; None where the object has no such reference."""
    owners = manifest["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner.get("controller")), None)


def controller_uid(manifest: Mapping[str, Any]) -> str:
    """Return the uid of the object's controller; empty where the object has no controller."""
    owner = controller_of(manifest)
    return owner["uid"] if owner is not None else ""


def controller_name(manifest: Mapping[str, Any], kind: str) -> str:
    """Return the name in the owner reference with `controller: true` to an object of ``kind``.

    Empty where the object has no such reference.
    """
    owners = manifest["metadata"].get("ownerReferences", [])
    return next((owner["name"] for owner in owners if owner.get("controller") and owner["kind"] == kind), "")
