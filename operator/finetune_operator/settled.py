"""What is done for a job that has ended: nothing is created again, and what its last attempt left behind goes in time.
Called by `reconcile` for every job whose `Succeeded` is True or False; works on the stored object, whose spec need not
be readable."""

from __future__ import annotations

import logging

from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name
from finetune_operator.act.config_maps import delete_config_map
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.observe.record import Record
from finetune_operator.status.writer import StatusWriter

logger = logging.getLogger(__name__)

SIDECAR_SECONDS = 60.0
"""Pods that still run this long after their job was settled go with the child."""


class SettledJobs:
    """Tidies up after jobs that have ended."""

    def __init__(self, cluster: KubeClient, backend: Backend, writer: StatusWriter) -> None:
        """Delete with ``cluster`` and ``backend``, and say so with ``writer``."""
        self._cluster = cluster
        self._backend = backend
        self._writer = writer

    async def tidy(self, record: Record) -> float | None:
        """Remove what is due; return in how many seconds something will be, None where nothing ever will."""
        ended, started = record.stored.completion_time, record.stored.attempts.started
        if ended is None or not started:
            return None
        name = attempt_name(record.key.name, record.uid, started)
        child = await self._backend.observe(record.key.namespace, name)
        if child is not None and child.owner_uid != record.uid:
            child = None
        if child is None and record.condition_is(ConditionType.SUCCEEDED, "False"):
            # An operator that ended between the two leaves a ConfigMap whose child was never created.
            await delete_config_map(self._cluster, record.key.namespace, name, record.uid)
        age = (record.now - ended).total_seconds()
        waits = []
        if (ttl := time_to_live(record.raw)) is not None:
            if age >= ttl:
                await self._remove_all(record, name, child)
                return None
            waits.append(ttl - age)
        if child is not None and not child.finished and not child.deleting:
            if age >= SIDECAR_SECONDS:
                await self._backend.delete(record.key.namespace, child)
                logger.info("pods that outlived the job were removed", extra=record.log)
            else:
                waits.append(SIDECAR_SECONDS - age)
        return min(waits, default=None)

    async def _remove_all(self, record: Record, name: str, child: ChildObservation | None) -> None:
        """Remove child, pods and ConfigMap; the FineTuneJob stays, and its status names no child any more."""
        await delete_config_map(self._cluster, record.key.namespace, name, record.uid)
        if child is not None and not child.deleting:
            await self._backend.delete(record.key.namespace, child)
            logger.info("runPolicy.ttlSecondsAfterFinished is over: the job's objects were removed", extra=record.log)
        if record.stored.child is not None:
            await self._writer.forget_child(record)


def time_to_live(raw: dict[str, object]) -> int | None:
    """Return `runPolicy.ttlSecondsAfterFinished` of a stored job; None where it is absent."""
    spec = raw.get("spec")
    policy = spec.get("runPolicy") if isinstance(spec, dict) else None
    seconds = policy.get("ttlSecondsAfterFinished") if isinstance(policy, dict) else None
    return seconds if isinstance(seconds, int) else None
