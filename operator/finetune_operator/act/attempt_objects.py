"""Creates and deletes the objects of an attempt: a ConfigMap with the run file, and the backend's child object.

`reconcile.py` calls `AttemptObjects` after the attempt was recorded in the status. Where the API server refuses an
object, for example because of a quota, the error is kept in memory and the creation is tried again after a back-off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finetune_core.contract import RunConfig
from finetune_core.names import attempt_name
from finetune_operator.act.backoff import CreationBackoff
from finetune_operator.act.config_maps import create_config_map, delete_config_map
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.config_map import build_config_map
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.observe.stored_job import ParsedJob, StoredJob
from finetune_operator.queue.retryable import RetryableError

logger = logging.getLogger(__name__)


class AttemptObjects:
    """Creates and deletes the ConfigMap and the child object (PyTorchJob) of an attempt."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        backend: Backend,
        backoff: CreationBackoff,
        report_base_url: str,
        ca_bundle: Callable[[], str],
    ) -> None:
        """Send requests with ``cluster`` and ``backend``.

        ``ca_bundle`` returns the CA certificates of the report server as PEM text.
        """
        self._cluster = cluster
        self._backend = backend
        self._backoff = backoff
        self._report_base_url = report_base_url
        self._ca_bundle = ca_bundle

    async def create(
        self, job: ParsedJob, image: str, config: RunConfig, avoided_nodes: tuple[str, ...] = ()
    ) -> ChildObservation:
        """Create ConfigMap and child of the current attempt, and return the child.

        The scheduler places the pods on ``avoided_nodes`` only where no other node can take them.
        Raises RetryableError where one of the two can't be created, and as long as the back-off after that lasts.
        """
        if job.memory.problem is not None and self._backoff.holds(job.memory):
            raise job.memory.problem
        try:
            child = await self._create(job, image, config, avoided_nodes)
        except RetryableError as problem:
            self._backoff.failed(job.memory, problem)
            logger.warning("attempt not created: %s", problem.message, extra=job.log_fields)
            raise
        self._backoff.reset(job.memory)
        logger.info("attempt created", extra=job.log_fields)
        return child

    async def remove(self, job: StoredJob, child: ChildObservation) -> None:
        """Delete the ConfigMap and the child of an attempt that ended. The garbage collector deletes its pods."""
        await delete_config_map(self._cluster, job.key.namespace, child.name, job.uid)
        await self._backend.delete(job.key.namespace, child)
        logger.info("attempt removed", extra=job.log_fields)

    async def remove_orphans(self, job: StoredJob, pods: Sequence[PodObservation]) -> None:
        """Delete ``pods``, whose attempt has ended and whose child somebody deleted without them.

        A pod whose deletion is refused, for example by an admission policy, is remembered and no longer waited for.
        """
        for pod in pods:
            try:
                await self._cluster.delete_pod(job.key.namespace, pod.name, pod.uid)
            except ApiError as error:
                if not error.is_refusal:
                    raise
                job.memory.undeletable_pods.add(pod.uid)
                logger.warning("orphaned pod %s was not removed: %s", pod.name, error, extra=job.log_fields)
            else:
                logger.info("orphaned pod %s removed", pod.name, extra=job.log_fields)

    async def _create(
        self, job: ParsedJob, image: str, config: RunConfig, avoided_nodes: tuple[str, ...]
    ) -> ChildObservation:
        """Create the ConfigMap, then the child. Their names are deterministic, so that a retry finds them again."""
        metadata, number = job.resource.metadata, job.status.attempts.started
        if number > 1:
            # The ConfigMap of the attempt before is deleted here. It still exists where somebody else deleted the child
            # of that attempt, or where that child was never created.
            before = attempt_name(metadata.name, metadata.uid, number - 1)
            await delete_config_map(self._cluster, metadata.namespace, before, metadata.uid)
        name = attempt_name(metadata.name, metadata.uid, number)
        plan = AttemptSpec(
            number=number,
            name=name,
            image=image,
            report_base_url=self._report_base_url,
            avoided_nodes=avoided_nodes,
        )
        await create_config_map(self._cluster, build_config_map(job.resource, plan, config, self._ca_bundle()))
        return await self._backend.create(self._backend.build(job.resource, plan))
