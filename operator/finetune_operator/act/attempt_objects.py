"""Creates and deletes the objects of an attempt: a ConfigMap with the run file, a NetworkPolicy, and the
backend's child object.

`reconcile.py` calls `create` after the attempt was recorded in the status, and `remove` and `remove_orphans` after the
attempt has ended. `settled.py` calls `remove_orphans` for a job that has ended. Where the API server refuses an object,
for example because of a quota, the error is kept in memory and the creation is tried again after a back-off.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence

from finetune_core.contract import RunConfig
from finetune_core.names import attempt_name
from finetune_operator.act.backoff import CreationBackoff
from finetune_operator.act.config_maps import create_config_map, delete_config_map
from finetune_operator.act.network_policies import NetworkPolicies
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.config_map import build_config_map
from finetune_operator.objects.disk_space import sizes_of_inputs
from finetune_operator.objects.network_policy import build_network_policy
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.observe.stored_job import ParsedJob, StoredJob
from finetune_operator.queue.retryable import RetryableError

logger = logging.getLogger(__name__)

NONCE_BYTES = 16
"""Length of the random nonce of an attempt in bytes."""


class AttemptObjects:
    """Creates and deletes the ConfigMap, the NetworkPolicy and the child object (PyTorchJob) of an attempt."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        backend: Backend,
        backoff: CreationBackoff,
        network_policies: NetworkPolicies,
        report_base_url: str,
        ca_bundle: Callable[[], str],
        nonce: Callable[[], str] = lambda: secrets.token_hex(NONCE_BYTES),
    ) -> None:
        """Send requests with ``cluster`` and ``backend``.

        ``report_base_url`` is the address of the report server, for example
        ``"https://finetune-operator.finetune-system.svc:8443"``. ``ca_bundle`` returns the CA certificates of the
        report server as PEM text. ``nonce`` returns a new random text for the ConfigMap of an attempt.
        """
        self._cluster = cluster
        self._backend = backend
        self._backoff = backoff
        self._network_policies = network_policies
        self._report_base_url = report_base_url
        self._ca_bundle = ca_bundle
        self._nonce = nonce

    async def create(
        self, job: ParsedJob, image: str, config: RunConfig, avoided_nodes: tuple[str, ...] = ()
    ) -> ChildObservation:
        """Create ConfigMap, NetworkPolicy and child of the current attempt, and return the child.

        ``image`` is the image of the pods, and ``config`` becomes the run file in the ConfigMap. The scheduler is asked
        to prefer any other node to ``avoided_nodes``.

        Raises RetryableError where the API server refuses an object or another owner has an object of the same name,
        and while the back-off after such a failure lasts.
        """
        self._backoff.check(job.memory)
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
        """Delete the ConfigMap and the child of an attempt that ended. The garbage collector deletes the pods of the
        child.

        The NetworkPolicy stays, because the pods may run on for the length of their grace period. It is deleted when
        the next attempt begins, or by `settled.py`.
        """
        await delete_config_map(self._cluster, job.key.namespace, child.name, job.uid)
        await self._backend.delete(job.key.namespace, child)
        logger.info("attempt removed", extra=job.log_fields)

    async def remove_orphans(self, job: StoredJob, pods: Sequence[PodObservation]) -> None:
        """Delete ``pods``, which still exist although their attempt has ended and somebody has deleted their child.

        A pod whose deletion is refused, for example by an admission policy, is remembered in
        `JobMemory.undeletable_pods`, so that nothing waits for the pod any longer.
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
        """Create the ConfigMap, the NetworkPolicy and the child, in this order.

        The names of the three objects are deterministic, so that a retry finds the objects that exist already. The
        nonce is random, and a retry keeps the nonce of an existing ConfigMap.
        """
        metadata, number = job.resource.metadata, job.status.attempts.started
        if number > 1:
            # Delete the ConfigMap and the NetworkPolicy of the previous attempt, whose pods have ended. The ConfigMap
            # still exists where somebody else deleted the child of the previous attempt, or where that child was never
            # created.
            before = attempt_name(metadata.name, metadata.uid, number - 1)
            await delete_config_map(self._cluster, metadata.namespace, before, metadata.uid)
            await self._network_policies.delete(metadata.namespace, before, metadata.uid)
        name = attempt_name(metadata.name, metadata.uid, number)
        attempt = AttemptSpec(
            number=number,
            name=name,
            image=image,
            report_base_url=self._report_base_url,
            avoided_nodes=avoided_nodes,
            sizes=sizes_of_inputs(job.status.preflight),
            plan=job.status.plan,
        )
        run_file = build_config_map(job.resource, attempt, config, ca_bundle=self._ca_bundle(), nonce=self._nonce())
        await create_config_map(self._cluster, run_file)
        await self._network_policies.create(build_network_policy(job.resource, attempt))
        return await self._backend.create(self._backend.build(job.resource, attempt))
