"""Creates and deletes the objects of a try of the preflight check: a ConfigMap with the run file, and a pod.

`reconcile.py` calls `PreflightObjects` before attempt 1 exists, once `status.preflight` records the check. `settled.py`
calls `remove_all` for a job that ended without an attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from finetune_core.api.conditions import Reason
from finetune_core.contract import RunConfig
from finetune_core.names import preflight_name
from finetune_operator import messages
from finetune_operator.act.backoff import CreationBackoff
from finetune_operator.act.config_maps import create_config_map, delete_config_map
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.labels import JOB_UID, PREFLIGHT
from finetune_operator.objects.observations import PodObservation, controller_uid
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_config_map, build_preflight_pod
from finetune_operator.observe.ownership import preflight_pods
from finetune_operator.observe.stored_job import ParsedJob, StoredJob
from finetune_operator.queue.requeue import Write
from finetune_operator.queue.retryable import RetryableError

logger = logging.getLogger(__name__)


class PreflightObjects:
    """Creates and deletes the ConfigMap and the pod of each try of the preflight check."""

    def __init__(self, cluster: KubeClient, backoff: CreationBackoff) -> None:
        """Create and delete objects with ``cluster``, but create none for a job whose ``backoff`` still lasts."""
        self._cluster = cluster
        self._backoff = backoff

    async def create(self, job: ParsedJob, number: int, image: str, config: RunConfig) -> None:
        """Create ConfigMap and pod of try ``number``. The pod runs ``image``; the ConfigMap has ``config`` as run file.

        Raises RetryableError where the API server refuses one of the two objects or another owner has an object of the
        same name, and while the back-off after such a failure lasts.
        """
        self._backoff.check(job.memory)
        try:
            await self._create(job, number, image, config)
        except RetryableError as problem:
            self._backoff.failed(job.memory, problem)
            logger.warning("preflight pod not created: %s", problem.message, extra=job.log_fields)
            raise
        self._backoff.reset(job.memory)
        logger.info("preflight pod of try %d created", number, extra=job.log_fields)

    async def remove_all(self, job: StoredJob) -> Write | None:
        """Delete all preflight pods that the job owns and that are not being deleted yet, and their ConfigMaps.

        Returns a `Write` for the last deleted pod; None where no pod was deleted.
        """
        found = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid},{PREFLIGHT}")
        return await self.remove(job, [pod for pod in preflight_pods(found, job) if pod.delete_deadline is None])

    async def remove(self, job: StoredJob, pods: Sequence[PodObservation]) -> Write | None:
        """Delete ``pods``, each the pod of a try, and their ConfigMaps.

        Returns a `Write` for the last pod that still existed; None where no pod existed any more.
        """
        write = None
        for pod in pods:
            await delete_config_map(self._cluster, job.key.namespace, pod.name, job.uid)
            if await self._cluster.delete_pod(job.key.namespace, pod.name, pod.uid):
                write = Write(f"deletion of pod {pod.name}")
                logger.info("preflight pod of try %d removed", pod.index, extra=job.log_fields)
        return write

    async def _create(self, job: ParsedJob, number: int, image: str, config: RunConfig) -> None:
        """Create the ConfigMap, then the pod.

        The names of both objects are deterministic, so that a retry finds an object that exists already.
        """
        if number > 1:
            # Delete the ConfigMap of the previous try. This ConfigMap still exists where somebody else deleted the pod
            # of that try.
            before = preflight_name(job.key.name, job.uid, number - 1)
            await delete_config_map(self._cluster, job.key.namespace, before, job.uid)
        name = preflight_name(job.key.name, job.uid, number)
        plan = PreflightSpec(number=number, name=name, image=image)
        try:
            await create_config_map(self._cluster, build_preflight_config_map(job.resource, plan, config))
        except RetryableError as error:
            raise RetryableError(Reason.OUTSIDE_FAILURE, error.message) from error
        pod = build_preflight_pod(job.resource, plan)
        try:
            await self._cluster.create_pod(pod)
        except ApiError as error:
            if error.is_name_taken:
                await self._accept_existing(job, pod)
            elif error.is_refusal:
                message = messages.backend_refused("Pod", name, error.message)
                raise RetryableError(Reason.OUTSIDE_FAILURE, message) from error
            else:
                raise

    async def _accept_existing(self, job: ParsedJob, pod: Manifest) -> None:
        """Accept the existing pod that has the name of ``pod``; raise RetryableError unless this job owns that pod."""
        found = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid},{PREFLIGHT}")
        ours = [item for item in found if item["metadata"]["name"] == pod["metadata"]["name"]]
        if not ours or controller_uid(ours[0]) != job.uid:
            message = messages.name_conflict("Pod", pod["metadata"]["name"])
            raise RetryableError(Reason.OUTSIDE_FAILURE, message)
