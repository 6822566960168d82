"""Writes the status where it differs from the stored one, and then tells its transitions. Called by `reconcile`; the
only place of the operator that writes a FineTuneJob."""

from __future__ import annotations

from collections.abc import Callable

from finetune_core.api import FineTuneJobStatus
from finetune_operator.kube.client import KubeClient
from finetune_operator.observe.record import Record
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import JobMemory
from finetune_operator.status.budget import WriteBudget
from finetune_operator.status.compute import compute_status, is_news, is_transition
from finetune_operator.status.conditions import View
from finetune_operator.status.recorder import Recorder


class StatusWriter:
    """Applies the status of one job at a time."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        recorder: Recorder,
        metrics: Metrics,
        child_kind: str,
        clock: Callable[[], float],
    ) -> None:
        """Write with ``cluster``, tell with ``recorder``."""
        self._cluster = cluster
        self._recorder = recorder
        self._metrics = metrics
        self._child_kind = child_kind
        self._clock = clock
        self._budget = WriteBudget(clock)

    async def write(self, record: Record, view: View) -> float | None:
        """Apply the status if it differs; new numbers wait until ten seconds have passed since the job's last write,
        and for their share of the writes of all jobs.

        Returns in how many seconds it is to be written where it waits. Raises ApiError (409) where the job changed
        since it was read.
        """
        status = compute_status(record.stored, view, child_kind=self._child_kind)
        self._metrics.jobs.update(record.key, status)
        old = record.stored if record.raw.get("status") else None
        if not is_news(old, status):
            return None
        if is_transition(old, status):
            self._budget.spend()
        elif (left := self._seconds_to_numbers(record.memory)) > 0:
            return left
        await self._apply(record, status)
        await self._recorder.tell(record, status)
        return None

    def _seconds_to_numbers(self, memory: JobMemory) -> float:
        """Return how long new numbers still wait: for the job's ten seconds, and for their place among all jobs."""
        if memory.progress_write_at is None:
            memory.progress_write_at = self._budget.reserve()
        return memory.seconds_to_progress_write(self._clock())

    async def forget_child(self, record: Record) -> None:
        """Write that the child of a settled job is gone; everything else stays as it is."""
        await self._apply(record, record.stored.model_copy(update={"child": None}))

    async def _apply(self, record: Record, status: FineTuneJobStatus) -> None:
        await self._cluster.apply_status(record.key, record.raw["metadata"]["resourceVersion"], status.to_json())
        record.memory.status_written_at, record.memory.progress_write_at = self._clock(), None
        self._metrics.status_writes.inc()
