"""Why a pod does not run yet, in a person's words: what scheduler, kubelet and the newest warning event say. Pure."""

from __future__ import annotations

from finetune_operator import messages
from finetune_operator.observed import ContainerState, PodObservation

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


def pod_detail(pod: PodObservation, hint: str) -> str:
    """Return why ``pod`` does not run, where that is known; ``hint`` is the newest warning event about it."""
    if pod.unschedulable:
        return pod.unschedulable
    container = pod.container
    if container is None or container.state is not ContainerState.WAITING:
        return ""
    if container.reason in _IMAGE_REASONS:
        # The kubelet alternates between ErrImagePull and ImagePullBackOff; both end with the same detail.
        return messages.image_pull(container.message.split("ErrImagePull: ")[-1] or container.reason)
    if container.reason == "ContainerCreating":
        return hint
    return f"{container.reason}: {container.message}" if container.message else container.reason
