"""Why a pod does not run yet, in a person's words: what scheduler, kubelet and the newest warning event say. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator import messages
from finetune_operator.objects.observations import ContainerState, PodObservation

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


def attempt_detail(pods: Sequence[PodObservation], nodes: int, hint: str) -> str:
    """Return what an attempt of ``nodes`` pods waits for, of which ``pods`` exist, as one sentence."""
    if not pods:
        return hint or messages.NO_PODS
    for pod in sorted(pods, key=lambda pod: pod.index):
        if detail := pod_detail(pod, hint):
            return messages.waiting_pod(pod.name, detail)
    return messages.waiting_for_reports(nodes, sum(pod.running for pod in pods))
