"""Creates the events of a transition, after its status was written. Called by `reconcile`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from finetune_core.api import FineTuneJobStatus
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.observe.record import Record
from finetune_operator.queue.memory import JobMemory
from finetune_operator.status.transitions import event_manifest, notices

logger = logging.getLogger(__name__)

LEAST_SECONDS_BETWEEN_EVENTS = 60.0
"""Between two events of one job and one reason, where no new attempt lies between them."""


class Recorder:
    """Tells transitions as events and in the log."""

    def __init__(
        self, cluster: KubeClient, *, instance: str, now: Callable[[], datetime], clock: Callable[[], float]
    ) -> None:
        """Report as ``instance``, the operator's pod; ``clock`` (monotonic seconds) tells what was just told."""
        self._cluster = cluster
        self._instance = instance
        self._now = now
        self._clock = clock

    async def tell(self, record: Record, new: FineTuneJobStatus) -> None:
        """Create the events from the stored status to ``new``. One that is refused is logged: it changes nothing."""
        now = self._now()
        log = record.log | {"attempt": new.attempts.started}
        for notice in notices(record.stored, new, now):
            logger.info("%s: %s", notice.reason, notice.note, extra=log)
            if notice.recurs and not self._due(record.memory, notice.reason):
                continue  # the condition says it all the time
            manifest = event_manifest(notice, record.key, record.uid, now, self._instance)
            try:
                await self._cluster.create_event(record.key.namespace, manifest)
            except ApiError as error:
                logger.warning("event not created: %s", error, extra=log)

    def _due(self, memory: JobMemory, reason: str) -> bool:
        """Whether ``reason`` was not told within the last minute; it counts as told now."""
        told = memory.event_created_at.get(reason)
        if told is not None and self._clock() - told < LEAST_SECONDS_BETWEEN_EVENTS:
            return False
        memory.event_created_at[reason] = self._clock()
        return True
