"""Writes the status of a job where it differs from the stored status, and then creates the events about the change.

`reconcile.py` and `settled.py` call `StatusWriter`. No other module of the operator writes to a FineTuneJob.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.attempt_causes import Cause
from finetune_core.api.status import AttemptsStatus
from finetune_operator.kube.client import KubeClient
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import JobMemory
from finetune_operator.status.budget import WriteBudget
from finetune_operator.status.compute import compute_status, is_news, is_transition
from finetune_operator.status.event_recorder import EventRecorder
from finetune_operator.status.inputs import StatusInput


class StatusWriter:
    """Computes the new status of a job, and writes it to the API server where and when that is needed."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        recorder: EventRecorder,
        metrics: Metrics,
        child_kind: str,
        clock: Callable[[], float],
    ) -> None:
        """Write with ``cluster`` and create events with ``recorder``.

        ``child_kind`` is the kind of child objects, for example "PyTorchJob". ``clock`` returns monotonic seconds.
        """
        self._cluster = cluster
        self._recorder = recorder
        self._metrics = metrics
        self._child_kind = child_kind
        self._clock = clock
        self._budget = WriteBudget(clock)

    async def write(self, job: StoredJob, given: StatusInput) -> float | None:
        """Write the status that follows from ``given`` where it differs from the stored status.

        A change such as that of a condition (see `is_transition`) is written at once. New numbers alone are not written
        within ten seconds after the job's last write, and not while the write budget of all jobs is used up. Returns in
        how many seconds such numbers may be written; None where nothing waits. Raises ApiError (409) where the job has
        changed since it was read.
        """
        status = compute_status(job.status, given, child_kind=self._child_kind)
        self._metrics.jobs.update(job.key, status)
        old = job.status if job.manifest.get("status") else None
        if not is_news(old, status):
            return None
        if is_transition(old, status):
            self._budget.spend()
        elif (left := self._seconds_to_numbers(job.memory)) > 0:
            return left
        await self._apply(job, status)
        self._count_refusals(job.status.attempts, status.attempts)
        await self._recorder.record(job, status)
        return None

    def _seconds_to_numbers(self, memory: JobMemory) -> float:
        """Return for how many seconds new numbers still wait; reserve their place in the budget where not done yet."""
        if memory.progress_write_at is None:
            memory.progress_write_at = self._budget.reserve()
        return memory.seconds_to_progress_write(self._clock())

    async def forget_child(self, job: StoredJob) -> None:
        """Remove `status.child` of an ended job, because the job's PyTorchJob no longer exists.

        All other fields stay as they are.
        """
        await self._apply(job, job.status.model_copy(update={"child": None}))

    def _count_refusals(self, old: AttemptsStatus, new: AttemptsStatus) -> None:
        """Count, by node, the attempts of ``new`` that a node ended by refusing a pod and that are not in ``old``."""
        last = old.recent[-1].number if old.recent else 0
        for past in new.recent:
            if past.number > last and past.reason == Cause.NODE_REFUSED and past.node:
                self._metrics.node_refusals.labels(node=past.node).inc()

    async def _apply(self, job: StoredJob, status: FineTuneJobStatus) -> None:
        await self._cluster.apply_status(job.key, job.manifest["metadata"]["resourceVersion"], status.to_json())
        job.memory.status_written_at, job.memory.progress_write_at = self._clock(), None
        self._metrics.status_writes.inc()
