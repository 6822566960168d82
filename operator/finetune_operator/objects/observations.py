"""What the operator saw of an attempt: pods and child as values. Parsed here from what the API server sent; the
verdict, the conditions and the messages are computed from these and never from raw objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from finetune_core.contract import Result
from finetune_operator.objects.labels import ATTEMPT, LAST_CHECKPOINT_TIME, PREFLIGHT, REPLICA_INDEX, TRAINING_CONTAINER


class ContainerState(StrEnum):
    """State of the container that trains."""

    WAITING = "Waiting"
    RUNNING = "Running"
    TERMINATED = "Terminated"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerObservation:
    """The container `pytorch` of a pod."""

    state: ContainerState
    reason: str = ""
    """Of waiting (ErrImagePull, ContainerCreating) or of the end (OOMKilled, Error, Completed)."""
    message: str = ""
    """Why it waits, or its termination message."""
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image_id: str = ""
    """What the node pulled: `repository@sha256:...`, or a bare digest of an image that no registry gave."""

    @property
    def result(self) -> Result | None:
        """The trainer's result; None where it left none."""
        return Result.from_termination_message(self.message) if self.state is ContainerState.TERMINATED else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PodObservation:
    """A pod of an attempt."""

    name: str
    uid: str
    attempt: int
    index: int
    phase: str = "Pending"
    reason: str = ""
    """Why the phase is Failed: Evicted, NodeLost."""
    message: str = ""
    node: str = ""
    version: int = 0
    """metadata.resourceVersion: of two pods, the one that changed last has the higher."""
    created_at: datetime
    scheduled_at: datetime | None = None
    """When it got its node, and with it its GPUs."""
    delete_requested_at: datetime | None = None
    """When somebody asked for its deletion."""
    delete_deadline: datetime | None = None
    """metadata.deletionTimestamp: when its grace period ends."""
    disruption: str = ""
    """Reason of a DisruptionTarget condition."""
    disrupted_at: datetime | None = None
    unschedulable: str = ""
    """The scheduler's sentence, while it finds no node."""
    container: ContainerObservation | None = None
    memory_limit: str = ""
    """Of the training container, as it was asked for, such as 64Gi."""
    checkpoint_time: str = ""
    """Annotation that tells schedulers when the job last saved."""

    @property
    def ended(self) -> bool:
        """Whether training in it has ended, whatever its sidecars do."""
        if self.container is not None and self.container.state is ContainerState.TERMINATED:
            return True
        return self.phase in ("Failed", "Succeeded")

    @property
    def running(self) -> bool:
        """Whether the training container runs."""
        return self.container is not None and self.container.state is ContainerState.RUNNING

    @property
    def ended_at(self) -> datetime | None:
        """When training in it ended; None while it goes on, or where nobody knows."""
        return self.container.finished_at if self.container is not None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildObservation:
    """The backend's object of an attempt."""

    name: str
    uid: str
    owner_uid: str
    deleting: bool = False
    suspended: bool = False
    """Its queue holds it, or has just let it go and the backend has not acted on that yet."""
    resumed_at: datetime | None = None
    """When the backend last resumed it."""
    failed_at: datetime | None = None
    replicas: int
    succeeded: bool = False
    failed: bool = False
    message: str = ""
    """The backend's sentence about its end."""

    @property
    def finished(self) -> bool:
        """Whether the backend does nothing more with it."""
        return self.succeeded or self.failed


def parse_time(text: str | None) -> datetime | None:
    """Return a Kubernetes time (RFC 3339) or None."""
    return datetime.fromisoformat(text) if text else None


def parse_pod(pod: Mapping[str, Any]) -> PodObservation | None:
    """Return the observation of a pod; None where its labels are not those of an attempt's pod."""
    labels = pod["metadata"].get("labels", {})
    attempt, index = labels.get(ATTEMPT, ""), labels.get(REPLICA_INDEX, "")
    if not (attempt.isdigit() and index.isdigit()):
        return None
    return _observation(pod, int(attempt), int(index))


def parse_preflight_pod(pod: Mapping[str, Any]) -> PodObservation | None:
    """Return the observation of a pod, with the try as `index` and attempt 0; None where it is not a preflight pod."""
    number = pod["metadata"].get("labels", {}).get(PREFLIGHT, "")
    return _observation(pod, 0, int(number)) if number.isdigit() else None


def _observation(pod: Mapping[str, Any], attempt: int, index: int) -> PodObservation:
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    disruption = conditions.get("DisruptionTarget", {})
    disrupted = disruption.get("status") == "True"
    scheduled = conditions.get("PodScheduled", {})
    deadline = parse_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    created = parse_time(metadata["creationTimestamp"])
    assert created is not None
    return PodObservation(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt,
        index=index,
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        node=spec.get("nodeName", ""),
        version=int(version) if (version := metadata.get("resourceVersion", "")).isdigit() else 0,
        created_at=created,
        scheduled_at=parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        delete_requested_at=deadline - grace if deadline else None,
        delete_deadline=deadline,
        disruption=disruption.get("reason", "") or "DisruptionTarget" if disrupted else "",
        disrupted_at=parse_time(disruption.get("lastTransitionTime")) if disrupted else None,
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        container=_parse_container(status.get("containerStatuses", [])),
        memory_limit=_memory_limit(spec.get("containers", [])),
        checkpoint_time=metadata.get("annotations", {}).get(LAST_CHECKPOINT_TIME, ""),
    )


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


def controller_uid(manifest: Mapping[str, Any]) -> str:
    """Return the uid of the object's controlling owner; empty where it has none."""
    owners = manifest["metadata"].get("ownerReferences", [])
    return next((owner["uid"] for owner in owners if owner.get("controller")), "")
