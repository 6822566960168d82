"""Says in one sentence why pods do not run yet, from what scheduler, kubelet and warning events report.

Pure functions. `observer.py`, the preflight decision and the conditions of the status use them.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator import messages
from finetune_operator.objects.observations import ContainerState, PodObservation

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


def why_pod_waits(pod: PodObservation, warning: str) -> str:
    """Return why ``pod`` does not run; empty where nothing is known. ``warning`` is the newest warning event about the
    pod."""
    if pod.unschedulable:
        return pod.unschedulable
    container = pod.container
    if container is None or container.state is not ContainerState.WAITING:
        return ""
    if container.reason in _IMAGE_REASONS:
        # The kubelet alternates between ErrImagePull and ImagePullBackOff; both messages end with the same detail.
        return messages.image_pull(container.message.split("ErrImagePull: ")[-1] or container.reason)
    if container.reason == "ContainerCreating":
        return warning
    return f"{container.reason}: {container.message}" if container.message else container.reason


def why_attempt_waits(pods: Sequence[PodObservation], nodes: int, warning: str) -> str:
    """Return what an attempt waits for that needs ``nodes`` pods and has ``pods``, as one sentence."""
    if not pods:
        return warning or messages.NO_PODS
    for pod in sorted(pods, key=lambda pod: pod.index):
        if detail := why_pod_waits(pod, warning):
            return messages.waiting_pod(pod.name, detail)
    return messages.waiting_for_reports(nodes, sum(pod.running for pod in pods))
