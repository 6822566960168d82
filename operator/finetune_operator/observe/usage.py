"""What a job has taken: GPU seconds, and seconds with a running pod. A pure function of what was counted so far and
of the pods' own times, so that it does not matter how often, or how late, the operator looks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_core.api.status import MOST_HOLDERS, UsageStatus
from finetune_operator.objects.observations import PodObservation

Span = tuple[datetime, datetime]


def account(counted: UsageStatus | None, pods: Sequence[PodObservation], *, gpus: int, now: datetime) -> UsageStatus:
    """Return the usage until ``now``; ``pods`` are those of all attempts, each with ``gpus`` GPUs.

    A pod holds its GPUs from the moment it gets a node until training in it has ended. One that was counted and is
    gone since went on until now.
    """
    counted = counted or UsageStatus()
    since = counted.last_update_time
    held = [span for pod in pods if (span := _clipped(pod.scheduled_at, _end(pod, now), since))]
    ran = [span for pod in pods if (span := _clipped(_started_at(pod), _end(pod, now), since))]
    known = {pod.uid for pod in pods}
    if since is not None and now > since:
        gone = [(since, now) for uid in counted.holders if uid not in known]
        held += gone
        ran += gone if counted.running else []
    holders = [pod.uid for pod in pods if pod.scheduled_at is not None and _end(pod, now) >= now and not pod.ended]
    return UsageStatus(
        gpu_seconds=counted.gpu_seconds + gpus * sum(_seconds(span) for span in held),
        active_seconds=counted.active_seconds + _union_seconds(ran),
        last_update_time=now,
        holders=sorted(holders)[:MOST_HOLDERS],
        running=any(pod.running and pod.uid in holders for pod in pods),
    )


def _started_at(pod: PodObservation) -> datetime | None:
    return pod.container.started_at if pod.container is not None else None


def _end(pod: PodObservation, now: datetime) -> datetime:
    """Return until when the pod counts: the end of training in it; with a dead kubelet the end of its grace period."""
    if pod.ended:
        return pod.ended_at or pod.delete_requested_at or pod.disrupted_at or pod.created_at
    return min(now, pod.delete_deadline) if pod.delete_deadline is not None else now


def _clipped(start: datetime | None, end: datetime, since: datetime | None) -> Span | None:
    """Return the part of the span that is not counted yet; None where nothing is left."""
    if start is None:
        return None
    start = max(start, since) if since is not None else start
    return (start, end) if end > start else None


def _seconds(span: Span) -> int:
    return int((span[1] - span[0]).total_seconds())


def _union_seconds(spans: Sequence[Span]) -> int:
    """Return how many seconds at least one of ``spans`` covers."""
    total, covered = 0, None
    for start, end in sorted(spans):
        begin = start if covered is None else max(start, covered)
        if end > begin:
            total += _seconds((begin, end))
            covered = end
    return total
