"""Says in one sentence why pods do not run yet, from what scheduler, kubelet and warning events report.

Pure functions. `observer.py`, `decide/preflight.py` and `status/conditions.py` call them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune_operator import messages
from finetune_operator.objects.observations import ContainerState, PodObservation

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")

_REFUSALS = (
    (re.compile('violates PodSecurity .*"IPC_LOCK"'), messages.CAPABILITY_REFUSED),
    # A ResourceQuota on `limits.cpu`; a LimitRange whose default limit is less than the request; and a LimitRange that
    # bounds the limit by the request.
    (re.compile(r"must specify .*\blimits\.cpu for"), messages.CPU_LIMIT_NEEDED),
    (re.compile("must be less than or equal to cpu limit of"), messages.CPU_LIMIT_NEEDED),
    (re.compile("cpu max limit to request ratio per .* but no limit is specified"), messages.CPU_LIMIT_NEEDED),
)
"""Texts in the answer of the API server that refuses a pod, and the sentence that says what to change."""


def why_pod_waits(pod: PodObservation, warning: str) -> str:
    """Return why ``pod`` does not run yet; empty where it runs or has ended, and where the reason is not known.

    ``warning`` is the newest warning event about a waiting pod of the same job; it may be empty.
    """
    if pod.unschedulable:
        return pod.unschedulable
    container = pod.container
    if container is None or container.state is not ContainerState.WAITING:
        return ""
    if container.reason in _IMAGE_REASONS:
        # The kubelet alternates between the reasons ErrImagePull and ImagePullBackOff. Only the end of the message is
        # used, because it is the same for both reasons.
        return messages.image_pull(container.message.split("ErrImagePull: ")[-1] or container.reason)
    if container.reason == "ContainerCreating":
        return warning
    return f"{container.reason}: {container.message}" if container.message else container.reason


def why_attempt_waits(pods: Sequence[PodObservation], nodes: int, warning: str) -> str:
    """Return, as one sentence, what an attempt waits for: pods that do not run yet, or the first report.

    The attempt needs ``nodes`` pods and has ``pods``. ``warning`` is the newest warning event about these pods or,
    without pods, about the child object; it may be empty.
    """
    if not pods:
        explanation = next((sentence for text, sentence in _REFUSALS if text.search(warning)), None)
        return messages.refused_pods(explanation, warning) if explanation else warning or messages.NO_PODS
    for pod in sorted(pods, key=lambda pod: pod.index):
        if detail := why_pod_waits(pod, warning):
            return messages.waiting_pod(pod.name, detail)
    return messages.waiting_for_reports(nodes, sum(pod.running for pod in pods))
