"""Tells schedulers when a job last saved: the annotation `volcano.sh/last-checkpoint-time` on its pods, by which one
that has to preempt somebody can take the pods that lose least. Called by `reconcile`.

The patch goes to the pods' status: there the API server takes metadata and lets nobody touch the spec, so that the
permission is none to change what a pod runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC

from finetune_core.api.status import CheckpointStatus
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.objects.labels import LAST_CHECKPOINT_TIME
from finetune_operator.objects.observations import PodObservation
from finetune_operator.observe.record import Look

logger = logging.getLogger(__name__)


def annotation_value(checkpoints: Sequence[CheckpointStatus]) -> str:
    """Return the time of the newest checkpoint (RFC 3339, UTC); empty where there is none."""
    return checkpoints[-1].time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if checkpoints else ""


def unaware(pods: Sequence[PodObservation], attempt: int, value: str) -> list[PodObservation]:
    """Return the pods of ``attempt`` that train and carry another value than ``value``."""
    return [pod for pod in pods if value and pod.attempt == attempt and pod.running and pod.checkpoint_time != value]


class CheckpointAnnotations:
    """Keeps the annotation of running pods true."""

    def __init__(self, cluster: KubeClient, *, enabled: bool) -> None:
        """Do nothing where not ``enabled``: the operator then has no permission either."""
        self._cluster = cluster
        self._enabled = enabled

    async def tell(self, look: Look, pods: Sequence[PodObservation]) -> None:
        """Annotate the pods that do not carry the time of the stored status yet. One that is gone meanwhile is fine."""
        current = look.stored.attempts.current
        if not self._enabled or current is None:
            return
        value = annotation_value(look.stored.checkpoints)
        for pod in unaware(pods, current.number, value):
            try:
                await self._cluster.annotate_pod(look.key.namespace, pod.name, pod.uid, {LAST_CHECKPOINT_TIME: value})
            except ApiError as error:
                # Nothing of the job depends on it; the next look tries again.
                if not (error.is_not_found or error.is_conflict):
                    logger.warning("pod %s was not annotated: %s", pod.name, error, extra=look.log)
