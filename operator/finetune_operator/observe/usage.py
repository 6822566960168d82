"""Counts what a job has used: GPU seconds, and seconds in which at least one pod ran (`status.usage`).

`usage_until` is a pure function of the current time, the stored count and the times in the manifests of the pods. So
the result does not depend on how often the operator reconciles the job, except for pods that vanish between two counts.
`observer.py` calls `usage_until`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_core.api.status import MOST_HOLDERS, UsageStatus
from finetune_operator.objects.observations import PodObservation

Span = tuple[datetime, datetime]


def usage_until(
    now: datetime, counted: UsageStatus | None, pods: Sequence[PodObservation], *, gpus: int
) -> UsageStatus:
    """Return the usage until ``now``: the usage ``counted`` plus what the pods have used since the last count.

    ``counted`` is `status.usage`; None where nothing is counted yet. Where ``counted.last_update_time`` is later than
    ``now``, the usage until that later time is returned, so that no number decreases. ``pods`` are the pods of all
    attempts, each with ``gpus`` GPUs. A pod holds its GPUs from the moment it gets a node until its training container
    has ended; `_end` says what counts as the end. A pod in ``counted.holders`` that no longer exists is assumed to have
    held its GPUs until ``now``.
    """
    counted = counted or UsageStatus()
    since = counted.last_update_time
    # The clock of the previous leader may have been ahead. Time that the previous leader has counted is not counted
    # again.
    now = now if since is None else max(now, since)
    held = [span for pod in pods if (span := _uncounted(pod.scheduled_at, _end(pod, now), since))]
    ran = [span for pod in pods if (span := _uncounted(_started_at(pod), _end(pod, now), since))]
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
    """Return when the training container began to run; None where it never ran.

    The result is None also for a container that its runtime could not start: for many runtimes, the kubelet gives such
    a container a start in the year 1970. A start before the pod was bound to its node comes from a node whose clock is
    behind. The time of the binding is then returned, or the time of the pod's creation where no binding is known.
    """
    if pod.container is None or pod.container.started_at is None or pod.container.never_ran:
        return None
    return max(pod.container.started_at, pod.scheduled_at or pod.created_at)


def _end(pod: PodObservation, now: datetime) -> datetime:
    """Return until when the pod counts as using its GPUs: the end of its training container, or else ``now``.

    An end after ``now`` comes from a node whose clock is ahead. Such an end counts as ``now``, because the time until
    that end would otherwise be counted again by every call. Where a pod has ended and its manifest does not give the
    time, the end is when the pod's deletion was requested, else when the pod was disrupted, else when it was created.
    A pod that is being deleted and has not ended counts at most until its grace period ends, because its kubelet may be
    dead.
    """
    if pod.ended:
        return min(now, pod.ended_at or pod.delete_requested_at or pod.disrupted_at or pod.created_at)
    return min(now, pod.delete_deadline) if pod.delete_deadline is not None else now


def _uncounted(start: datetime | None, end: datetime, since: datetime | None) -> Span | None:
    """Return the part of the time from ``start`` to ``end`` that lies after ``since``; None where this part is empty.

    ``start`` is None for a time that has not begun; ``since`` is None where the whole time is uncounted.
    """
    if start is None:
        return None
    start = max(start, since) if since is not None else start
    return (start, end) if end > start else None


def _seconds(span: Span) -> int:
    return int((span[1] - span[0]).total_seconds())


def _union_seconds(spans: Sequence[Span]) -> int:
    """Return the seconds that ``spans`` cover together. Seconds in several spans count once."""
    total, covered = 0, None
    for start, end in sorted(spans):
        begin = start if covered is None else max(start, covered)
        if end > begin:
            total += _seconds((begin, end))
            covered = end
    return total
