"""Annotates the pods of an attempt with the time of the job's newest checkpoint (`volcano.sh/last-checkpoint-time`).

A scheduler that has to preempt pods can then choose the pods that lose the least work. `reconcile.py` calls
`CheckpointAnnotations.update` after it has written the status. The patch goes to the pods' status subresource, because
the API server accepts metadata there but no change of the spec. So the operator needs no permission to change what a
pod runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC

from finetune_core.api.status import CheckpointStatus
from finetune_operator.kube.api_errors import REQUEST_ERRORS, ApiError, describe_error
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.labels import LAST_CHECKPOINT_TIME
from finetune_operator.objects.observations import PodObservation
from finetune_operator.observe.stored_job import StoredJob

logger = logging.getLogger(__name__)


def annotation_value(checkpoints: Sequence[CheckpointStatus]) -> str:
    """Return the time of the newest checkpoint, for example "2026-11-24T12:00:00Z".

    The text is empty where there is no checkpoint, and where the stored time is so close to the first or the last
    possible datetime that it can't be converted to UTC. No trainer reports such a time, but another program may have
    stored one.
    """
    if not checkpoints:
        return ""
    try:
        return checkpoints[-1].time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        return ""


def pods_to_annotate(pods: Sequence[PodObservation], attempt: int, value: str) -> list[PodObservation]:
    """Return the running pods of ``attempt`` whose annotation differs from ``value``; no pods for an empty value."""
    return [pod for pod in pods if value and pod.attempt == attempt and pod.running and pod.checkpoint_time != value]


class CheckpointAnnotations:
    """Keeps the annotation `volcano.sh/last-checkpoint-time` of running pods up to date."""

    def __init__(self, cluster: KubeClient, *, enabled: bool, clock: Callable[[], float]) -> None:
        """Annotate pods with ``cluster``.

        Where ``enabled`` is False no pod is annotated, because the chart then grants no permission for it. ``clock``
        returns monotonic seconds.
        """
        self._cluster = cluster
        self._enabled = enabled
        self._clock = clock

    async def update(self, job: StoredJob, pods: Sequence[PodObservation]) -> None:
        """Write the time of the newest checkpoint, as the stored status of ``job`` has it, into the annotation of its
        running pods. Of ``pods``, only those of the current attempt are annotated.

        A token bucket limits how often the pods of a job are annotated, because a pod can send any number of reports
        with new times. The bucket has the same rate as the one for the status writes that reports cause. Where the
        bucket holds no token, a later reconcile annotates the pods.
        """
        current = job.status.attempts.current
        if not self._enabled or current is None:
            return
        value = annotation_value(job.status.checkpoints)
        behind = pods_to_annotate(pods, current.number, value)
        if not behind or not job.memory.annotation_writes.take(self._clock()):
            return
        for pod in behind:
            try:
                await self._cluster.annotate_pod(job.key.namespace, pod.name, pod.uid, {LAST_CHECKPOINT_TIME: value})
            except REQUEST_ERRORS as error:
                # A failure is only logged, because nothing of the job depends on the annotation and a later reconcile
                # tries again. There is not even a log line where the pod is gone (404), or where a new pod with another
                # uid has the same name (409).
                if not (isinstance(error, ApiError) and (error.is_not_found or error.is_conflict)):
                    logger.warning(
                        "pod %s was not annotated: %s", pod.name, describe_error(error), extra=job.log_fields
                    )
