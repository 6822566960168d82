"""What is done for a job that has ended: nothing is created again, and what its attempt left behind goes in time.
Called by `reconcile` for every job whose `Succeeded` is True or False."""

from __future__ import annotations

import logging

from finetune_operator.backend import Backend
from finetune_operator.record import Record

logger = logging.getLogger(__name__)

SIDECAR_SECONDS = 60.0
"""Pods that still run this long after their job was settled go with the child."""


class SettledJobs:
    """Tidies up after jobs that have ended."""

    def __init__(self, backend: Backend) -> None:
        """Delete with ``backend``."""
        self._backend = backend

    async def tidy(self, record: Record) -> float | None:
        """Remove what is due; return in how many seconds something will be, None where nothing ever will."""
        if record.stored.child is None or record.stored.completion_time is None:
            return None
        child = await self._backend.observe(record.key.namespace, record.stored.child.name)
        if child is None or child.finished or child.deleting or child.owner_uid != record.uid:
            return None
        left = SIDECAR_SECONDS - (record.now - record.stored.completion_time).total_seconds()
        if left > 0:
            return left
        await self._backend.delete(record.key.namespace, child)
        logger.info("pods that outlived the job were removed", extra=record.log)
        return None
