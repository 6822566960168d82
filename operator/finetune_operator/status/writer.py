"""Writes the status of a job where it differs from the stored status, and then creates the events about the change.

`reconcile.py` and `settled.py` call `StatusWriter`. No other module of the operator writes to a FineTuneJob.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import ConditionType
from finetune_core.api.status import AttemptsStatus
from finetune_operator.kube.client import FIELD_MANAGER, KubeClient
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.requeue import Write
from finetune_operator.queue.token_bucket import TokenBucket
from finetune_operator.status.compute import compute_status
from finetune_operator.status.event_recorder import EventRecorder
from finetune_operator.status.inputs import StatusInput
from finetune_operator.status.preservation import preserve
from finetune_operator.status.urgency import Urgency, urgency

WRITES_PER_SECOND: Final = 70.0
"""Limit on the status writes per second over all jobs, after a burst. Only writes of new numbers wait for this limit.
With the limit, the numbers in the statuses of a thousand jobs are at most 15 s old, if the API server can take so many
writes. Without the limit, 5,000 jobs that each write every ten seconds would cause 500 writes per second."""
BURST: Final = 100.0
"""Largest number of writes of new numbers, over all jobs, that may come at once. Status writes that do not wait for the
limit use up this number as well."""


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
        self._budget = TokenBucket(per_second=WRITES_PER_SECOND, burst=BURST)

    async def write(self, job: StoredJob, given: StatusInput) -> float | None:
        """Write the status that follows from ``given`` where it differs from the stored status and may be written now.

        Returns the seconds after which the status may be written. None where the status was written, and where it
        differs at most in usage that grew with time.

        `status/urgency.py` decides how soon a status is written. The operator's own changes are written at once.
        Changes from a report are written once the token bucket of the job has a token. Where only numbers differ, two
        more limits hold: ten seconds must have passed since the last write, and the limit of all jobs must allow the
        write.

        Raises ApiError (409) where the job has changed since it was read.
        """
        status = self._compute(job, given)
        self._metrics.jobs.update(job.key, job.manifest.get("spec") or {}, status)
        old = job.status if job.manifest.get("status") else None
        found = urgency(old, status, lambda: self._compute(job, replace(given, report=None, reported_at=None)))
        if found is Urgency.UNCHANGED:
            return None
        if found is not Urgency.OWN and (left := self._seconds_to_turn(job.memory, found)) > 0:
            return left
        await self._write(job, status, waited=found is Urgency.NUMBERS)
        return None

    async def write_now(self, job: StoredJob, given: StatusInput) -> Write | None:
        """Write the status that follows from ``given`` at once, because it must be written before any object changes.

        Returns None where the API server answers that the write did not change the job. Raises ApiError (409) where
        the job has changed since it was read.
        """
        status = self._compute(job, given)
        self._metrics.jobs.update(job.key, job.manifest.get("spec") or {}, status)
        return await self._write(job, status, waited=False)

    async def write_settled(self, job: StoredJob, *, without_child: bool) -> None:
        """Write into the status of an ended job that its generation is observed, where that is not written yet.

        With ``without_child``, also remove `status.child`, because the job's PyTorchJob was removed. Nothing else
        changes, because no edit changes how a job has ended. kstatus (Flux, Argo CD) counts a job as in progress as
        long as its newest generation is not observed.
        """
        conditions = [
            item.model_copy(update={"observed_generation": job.generation}) if item.type in set(ConditionType) else item
            for item in job.status.conditions
        ]
        update: dict[str, object] = {"child": None} if without_child else {}
        if job.status.observed_generation != job.generation:
            update |= {"observed_generation": job.generation, "conditions": conditions}
        status = job.status.model_copy(update=update)
        if status != job.status:
            self._budget.spend(self._clock())
            await self._apply(job, status)

    def _compute(self, job: StoredJob, given: StatusInput) -> FineTuneJobStatus:
        """Return the status that follows from ``given``, with the parts that this version can't read left alone."""
        return compute_status(job.status, given, child_kind=self._child_kind).model_copy(update=job.left_alone)

    def _seconds_to_turn(self, memory: JobMemory, found: Urgency) -> float:
        """Return for how many seconds the status must still wait, and reserve its turn where none is reserved yet."""
        now = self._clock()
        if found is Urgency.NUMBERS:
            if memory.progress_write_at is None:
                memory.progress_write_at = self._budget.reserve(now)
            if (left := memory.seconds_to_progress_write(now)) > 0:
                return left
        return memory.seconds_to_reported_write(now)

    async def _write(self, job: StoredJob, status: FineTuneJobStatus, *, waited: bool) -> Write | None:
        """Write ``status``, and then create the events. ``waited`` says whether the write has waited for its turn in
        the limit of all jobs; a write that has not waited counts in this limit too."""
        if not waited:
            self._budget.spend(self._clock())
        write = await self._apply(job, status)
        if status.completion_time is not None and job.status.completion_time is None:
            self._metrics.jobs_ended.labels(ended_as(status)).inc()
        self._count_refusals(job.status.attempts, status.attempts)
        await self._recorder.record(job, status)
        return write

    def _count_refusals(self, old: AttemptsStatus, new: AttemptsStatus) -> None:
        """Count, by node, the attempts of ``new`` that a node ended by refusing a pod and that are not in ``old``."""
        last = old.recent[-1].number if old.recent else 0
        for past in new.recent:
            if past.number > last and past.reason == Cause.NODE_REFUSED and past.node:
                self._metrics.node_refusals.labels(node=past.node).inc()

    async def _apply(self, job: StoredJob, status: FineTuneJobStatus) -> Write | None:
        read = job.manifest["metadata"]["resourceVersion"]
        body = preserve(job.manifest, job.status.to_json(), status.to_json(), FIELD_MANAGER)
        written = await self._cluster.apply_status(job.key, read, body)
        job.memory.status_written(self._clock())
        self._metrics.status_writes.inc()
        return Write("status") if written != read else None


def ended_as(status: FineTuneJobStatus) -> str:
    """Return the reason with which a job with ``status`` ended: the reason of its condition `Succeeded`."""
    return next((item.reason for item in status.conditions if item.type == ConditionType.SUCCEEDED), "")
