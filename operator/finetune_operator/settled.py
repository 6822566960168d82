"""Removes the objects that an ended job leaves behind, each when it is due. Nothing is created for such a job.

`reconcile.py` calls `SettledJobs.tidy` for each job that has ended. The stored manifest is used instead of the parsed
spec, because this version may not be able to read the spec of an old job.
"""

from __future__ import annotations

import logging

from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name
from finetune_operator.act.attempt_objects import AttemptObjects
from finetune_operator.act.config_maps import delete_config_map
from finetune_operator.act.network_policies import NetworkPolicies
from finetune_operator.act.preflight_objects import PreflightObjects
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.labels import JOB_UID
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.ownership import orphans_of_ended
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.status.writer import StatusWriter

logger = logging.getLogger(__name__)

SIDECAR_SECONDS = 60.0
"""Seconds after the end of a job at which its pods that still run, for example because of a sidecar, are removed."""


class SettledJobs:
    """Removes the objects that ended jobs leave behind."""

    def __init__(
        self,
        cluster: KubeClient,
        backend: Backend,
        writer: StatusWriter,
        network_policies: NetworkPolicies,
        preflight_objects: PreflightObjects,
        attempt_objects: AttemptObjects,
    ) -> None:
        """Delete ConfigMaps with ``cluster`` and child objects with ``backend``.

        ``network_policies`` deletes NetworkPolicies, ``preflight_objects`` the objects of preflight checks, and
        ``attempt_objects`` pods without a child. ``writer`` removes a deleted child from the status.
        """
        self._attempt_objects = attempt_objects
        self._cluster = cluster
        self._backend = backend
        self._writer = writer
        self._network_policies = network_policies
        self._preflight_objects = preflight_objects

    async def tidy(self, job: StoredJob) -> float | None:
        """Remove those objects of the job whose time of removal has come, and then bring the job's status up to date.

        The status then says that the newest generation of the job is observed, for example after an edit of its TTL.
        Once the TTL is over and all objects are removed, the status no longer names the child object. Return in how
        many seconds the next object has to be removed; None if no other removal will follow.
        """
        after, all_removed = await self._remove_due(job)
        await self._writer.write_settled(job, without_child=all_removed)
        return after

    async def _remove_due(self, job: StoredJob) -> tuple[float | None, bool]:
        """Remove the objects whose removal is due.

        Return in how many seconds the next removal is due (None if none follows), and whether the TTL of the job is
        over, so that all objects of its last attempt were removed.
        """
        ended, started = job.ended_at, job.status.attempts.started
        if ended is None:
            return None, False
        if not started:
            # The job may have ended before the objects of its preflight check were gone.
            await self._preflight_objects.remove_all(job)
            return None, False
        name = attempt_name(job.key.name, job.uid, started)
        child = await self._backend.observe(job.key.namespace, name)
        if child is not None and child.owner_uid != job.uid:
            child = None
        if child is None and job.condition_is(ConditionType.SUCCEEDED, "False"):
            # ConfigMap and NetworkPolicy may exist without a child, because the operator may have crashed before it
            # created the child.
            await delete_config_map(self._cluster, job.key.namespace, name, job.uid)
            await self._network_policies.delete(job.key.namespace, name, job.uid)
        age = (job.now - ended).total_seconds()
        orphans = await self._orphans(job) if child is None and job.status.child is not None else []
        waits = []
        if (ttl := job.policy.ttl_seconds_after_finished) is not None:
            if age >= ttl:
                await self._remove_all(job, name, child)
                await self._attempt_objects.remove_orphans(job, orphans)
                return None, True
            waits.append(ttl - age)
        if running := [pod for pod in orphans if not pod.ended]:
            if age >= SIDECAR_SECONDS:
                await self._attempt_objects.remove_orphans(job, running)
            else:
                waits.append(SIDECAR_SECONDS - age)
        if child is not None and not child.finished and not child.deleting:
            if age >= SIDECAR_SECONDS:
                await self._backend.delete(job.key.namespace, child)
                logger.info("pods that outlived the job were removed", extra=job.log_fields)
            else:
                waits.append(SIDECAR_SECONDS - age)
        return min(waits, default=None), False

    async def _orphans(self, job: StoredJob) -> list[PodObservation]:
        """Return the pods of the last attempt that somebody kept when deleting their child (`--cascade=orphan`)."""
        pods = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid}")
        return orphans_of_ended(pods, job, self._backend)

    async def _remove_all(self, job: StoredJob, name: str, child: ChildObservation | None) -> None:
        """Remove the child object with its pods, the ConfigMap and the NetworkPolicy. The FineTuneJob stays."""
        await delete_config_map(self._cluster, job.key.namespace, name, job.uid)
        await self._network_policies.delete(job.key.namespace, name, job.uid)
        if child is not None and not child.deleting:
            await self._backend.delete(job.key.namespace, child)
            logger.info(
                "runPolicy.ttlSecondsAfterFinished is over: the job's objects were removed", extra=job.log_fields
            )
