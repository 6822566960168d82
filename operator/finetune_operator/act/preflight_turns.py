"""Lets a job create its preflight pod only when its turn has come, so that few checks run at the same time.

In each reconcile of a job that has not ended, `reconcile.py` passes what was read to `PreflightTurns.observe`, unless
this version can't read enough of the job's status. Before a check is recorded or a preflight pod is created,
`reconcile.py` asks `PreflightTurns.has_come`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from finetune_core.api import KIND, FineTuneJobStatus
from finetune_operator.decide.decision import Decision
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.labels import PREFLIGHT
from finetune_operator.objects.observations import PodObservation, controller_name, parse_preflight_pod
from finetune_operator.observe.observation import JobObservation
from finetune_operator.queue.key import Key
from finetune_operator.queue.preflight_slots import PreflightSlots

logger = logging.getLogger(__name__)

STARTING_SECONDS = 60.0
"""For this many seconds after its creation a preflight pod takes a slot even if it does not run yet. Later, the pod
takes a slot only while it runs. So a pod that can't start, for example because a Secret is missing, leaves its slot to
other jobs."""


class PreflightTurns:
    """Keeps the slots of the preflight checks in step with the pods that exist."""

    def __init__(self, cluster: KubeClient, slots: PreflightSlots, namespaces: Sequence[str]) -> None:
        """Give out ``slots``. Preflight pods that exist already are counted with ``cluster`` in ``namespaces``.

        An empty ``namespaces`` means all namespaces.
        """
        self._cluster = cluster
        self._slots = slots
        self._namespaces = namespaces
        self._counted = False

    @property
    def limit(self) -> int:
        """Largest number of checks that run at the same time."""
        return self._slots.limit

    def observe(self, key: Key, stored: FineTuneJobStatus, seen: JobObservation, decision: Decision) -> None:
        """Keep the slot of the job ``key`` if a preflight pod of the job uses a slot. Release the job's slot if the job
        has no such pod and is not about to create one.

        ``stored`` is the job's stored status, ``seen`` is what this reconcile has read, and ``decision`` follows from
        both.
        """
        if any(uses_slot(pod, seen.now) for pod in seen.preflight.pods):
            self._slots.occupy(key)
        elif not decision.starts_check(stored):
            self._slots.release(key)

    def forget(self, key: Key) -> None:
        """Take back the slot of the job ``key``, or its place in the line. The job has ended or no longer exists, or
        its preflight pod could not be created."""
        self._slots.release(key)

    async def has_come(self, key: Key, now: datetime) -> bool:
        """Return whether the job ``key`` has a slot, and so may create its preflight pod now.

        A job without a slot gets a free slot if its turn has come. Otherwise the job is reconciled again when its turn
        comes. The first call gives slots to the jobs of the preflight pods that exist already, because an earlier
        process of the operator may have created such pods.
        """
        if not self._counted:
            for namespace in self._namespaces or (None,):
                await self._count(namespace, now)
            self._counted = True
        return self._slots.acquire(key)

    async def _count(self, namespace: str | None, now: datetime) -> None:
        """Occupy a slot for each preflight pod in ``namespace`` that uses a slot; None means all namespaces."""
        try:
            pods = await self._cluster.list_pods(namespace, PREFLIGHT)
        except ApiError as error:
            if not error.is_refusal:
                raise
            # The namespace, or the operator's Role in the namespace, was deleted. Jobs of other namespaces go on.
            logger.warning("the preflight pods in %s could not be counted: %s", namespace, error)
            return
        for manifest in pods:
            # `Key.parse` returns None for an owner whose name no job can have. Anybody may create a pod with these
            # labels and such an owner.
            key = Key.parse(manifest["metadata"]["namespace"], controller_name(manifest, KIND))
            pod = parse_preflight_pod(manifest)
            if pod is not None and key is not None and uses_slot(pod, now):
                self._slots.occupy(key)


def uses_slot(pod: PodObservation, now: datetime) -> bool:
    """Return whether the preflight pod ``pod`` takes a slot: it runs, or is so young that it may still start."""
    if pod.ended:
        return False
    return pod.running or (now - pod.created_at).total_seconds() < STARTING_SECONDS
