"""Creates the events of a transition, after its status was written. Called by `reconcile`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime

from finetune_core.api import FineTuneJobStatus
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.keyqueue import Key
from finetune_operator.transitions import event_manifest, notices

logger = logging.getLogger(__name__)


class Recorder:
    """Tells transitions as events and in the log."""

    def __init__(self, cluster: Cluster, *, instance: str, now: Callable[[], datetime]) -> None:
        """Report as ``instance``, the operator's pod."""
        self._cluster = cluster
        self._instance = instance
        self._now = now

    async def tell(
        self, key: Key, uid: str, old: FineTuneJobStatus, new: FineTuneJobStatus, log: Mapping[str, object]
    ) -> None:
        """Create the events from ``old`` to ``new``. One that is refused is logged: it changes nothing."""
        now = self._now()
        for notice in notices(old, new, now):
            logger.info("%s: %s", notice.reason, notice.note, extra=dict(log))
            manifest = event_manifest(notice, key, uid, now, self._instance)
            try:
                await self._cluster.create_event(key.namespace, manifest)
            except ApiError as error:
                logger.warning("event not created: %s", error, extra=dict(log))
