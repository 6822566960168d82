"""Creates events about a job after its status was written.

`writer.py` calls `EventRecorder`. `events.py` decides which events are created.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from finetune_core.api import FineTuneJobStatus
from finetune_operator.kube.api_errors import REQUEST_ERRORS, describe_error
from finetune_operator.kube.client import KubeClient
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.queue.memory import JobMemory
from finetune_operator.status.events import event_manifest, events_between

logger = logging.getLogger(__name__)

LEAST_SECONDS_BETWEEN_EVENTS = 60.0
"""Shortest time in seconds between two events with the same reason about one job, for events that may recur."""


class EventRecorder:
    """Creates Kubernetes events about jobs, and logs each event as a line of the operator's log."""

    def __init__(
        self, cluster: KubeClient, *, instance: str, now: Callable[[], datetime], clock: Callable[[], float]
    ) -> None:
        """Create events with ``cluster`` in the name of ``instance``, the operator's pod.

        ``now`` returns the time that events carry; ``clock`` returns monotonic seconds.
        """
        self._cluster = cluster
        self._instance = instance
        self._now = now
        self._clock = clock

    async def record(self, job: StoredJob, new: FineTuneJobStatus) -> None:
        """Create the events about the change from the stored status to ``new``.

        Where an event can't be created, this is only logged.
        """
        now = self._now()
        log_fields = job.log_fields | {"attempt": new.attempts.started}
        for event in events_between(job.status, new, now):
            logger.info("%s: %s", event.reason, event.note, extra=log_fields)
            if event.recurs and not self._is_due(job.memory, event.reason):
                continue  # nothing is lost without this event, because a condition shows the same message
            manifest = event_manifest(event, job.key, job.uid, now, self._instance)
            try:
                await self._cluster.create_event(job.key.namespace, manifest)
            except REQUEST_ERRORS as error:
                # The reconcile goes on: the status, which says the same, is written already.
                logger.warning("event not created: %s", describe_error(error), extra=log_fields)

    def _is_due(self, memory: JobMemory, reason: str) -> bool:
        """Return whether no event with ``reason`` was created within the last minute.

        If so, the current time is noted as the time of the event that the caller creates next.
        """
        last = memory.event_created_at.get(reason)
        if last is not None and self._clock() - last < LEAST_SECONDS_BETWEEN_EVENTS:
            return False
        memory.event_created_at[reason] = self._clock()
        return True
