"""Reads Kubernetes' warning events about pods that do not start, and about child objects that get no pods.

Some causes appear in these events only, such as a Secret that can't be mounted or a quota that is used up.
`observer.py` calls `WarningReader` whenever it reads the objects of a job. The newest warning is kept in
`JobMemory.hint` and becomes part of the messages of the job's conditions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_core.api.conditions import ConditionType
from finetune_operator.kube.api_errors import REQUEST_ERRORS, describe_error
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS

logger = logging.getLogger(__name__)


class WarningReader:
    """Reads the newest warning event about the pods that a job waits for, or about the child object while it has no
    pods. For each attempt, events are read at most once in ten seconds."""

    def __init__(self, cluster: KubeClient, clock: Callable[[], float]) -> None:
        """Read with ``cluster``; ``clock`` returns monotonic seconds."""
        self._cluster = cluster
        self._clock = clock

    async def read_for_attempt(
        self, job: StoredJob, child: ChildObservation | None, pods: Sequence[PodObservation]
    ) -> None:
        """Update `JobMemory.hint`, the newest warning, for the current attempt. ``pods`` are the pods of all attempts.

        The hint is emptied where no attempt is current, and where the attempt trains, is ending or has a suspended
        child. Otherwise the hint is kept for ten seconds after each read of events. After these ten seconds, the hint
        is emptied if the attempt started less than five seconds ago, or if it has pods of which none waits to start.
        Else events are read.
        """
        memory, current = job.memory, job.status.attempts.current
        held = child is not None and child.suspended
        if job.condition_is(ConditionType.RUNNING, "True") or current is None or current.cause is not None or held:
            memory.hint = ""
            return
        if self._was_read_just_now(job):
            return
        own = [pod for pod in pods if pod.attempt == current.number]
        waiting = [pod.uid for pod in own if not pod.running and not pod.ended]
        if _seconds_since(current.start_time, job) < EVENTS_AFTER_SECONDS or (own and not waiting):
            memory.hint = ""
            return
        # Where no pod exists, the child's events are read, because they say why its controller creates no pods.
        await self._read(job, waiting or ([child.uid] if child else []))

    async def read_for_pod(self, job: StoredJob, pod: PodObservation | None) -> None:
        """Update `JobMemory.hint`, the newest warning, for the preflight pod ``pod``, which is None if there is none.

        The hint is emptied where the pod runs, has ended, does not exist, or was created less than five seconds ago.
        Otherwise events are read, unless `JobMemory.hint_read_at` lies less than ten seconds back.
        """
        if pod is None or pod.running or pod.ended or _seconds_since(pod.created_at, job) < EVENTS_AFTER_SECONDS:
            job.memory.hint = ""
        elif not self._was_read_just_now(job):
            await self._read(job, [pod.uid])

    def _was_read_just_now(self, job: StoredJob) -> bool:
        read_at = job.memory.hint_read_at
        return read_at is not None and self._clock() - read_at < EVENTS_EVERY_SECONDS

    async def _read(self, job: StoredJob, uids: Sequence[str]) -> None:
        """Set `JobMemory.hint` to the newest warning about the first object in ``uids`` that has warnings. Empty the
        hint where no object has any.

        Where the events can't be read, the hint stays as it is, and the reconcile goes on: no decision needs the hint.
        """
        job.memory.hint_read_at = self._clock()
        for uid in uids:
            try:
                warnings = await self._cluster.list_warnings(job.key.namespace, uid)
            except REQUEST_ERRORS as error:
                logger.warning("warning events not read: %s", describe_error(error), extra=job.log_fields)
                return
            if warnings:
                newest = max(warnings, key=_event_time)
                job.memory.hint = f"{newest.get('reason', '')}: {newest.get('note', '')}"
                return
        job.memory.hint = ""


def _seconds_since(moment: datetime, job: StoredJob) -> float:
    return (job.now - moment).total_seconds()


def _event_time(event: Mapping[str, Any]) -> str:
    """Return when ``event`` last happened, as text that sorts by time.

    Which field holds the time depends on the version of the events API that the sender of the event uses.
    """
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("deprecatedLastTimestamp")
        or event.get("eventTime")
        or event["metadata"]["creationTimestamp"]
    )
