"""Creates and deletes the objects of attempts: ConfigMap and child. Called by `reconcile` after the bookkeeping; what
stands in the way outside the job's spec is kept in its memory and tried again after a back-off."""

from __future__ import annotations

import logging
from collections.abc import Callable

from finetune_core.contract import RunConfig
from finetune_core.names import attempt_name
from finetune_operator.act.config_maps import create_config_map, delete_config_map
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.config_map import build_config_map
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.observe.record import Look
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.retryable import FIRST_RETRY_SECONDS, RetryableError
from finetune_operator.queue.work_queue import backoff_seconds

logger = logging.getLogger(__name__)


class AttemptObjects:
    """Makes and removes what an attempt consists of."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        backend: Backend,
        trainer_image: str,
        report_base_url: str,
        ca_bundle: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        """Run ``trainer_image`` where a job names none; ``ca_bundle`` returns the CA of the report server."""
        self._cluster = cluster
        self._backend = backend
        self._trainer_image = trainer_image
        self._report_base_url = report_base_url
        self._ca_bundle = ca_bundle
        self._clock = clock

    def image(self, look: Look) -> str:
        """Return the image that the job's pods run: once it stands in the status it never changes."""
        return look.stored.image or look.job.spec.pod_template.image or self._trainer_image

    async def create(self, look: Look, config: RunConfig) -> ChildObservation:
        """Create the objects of the current attempt, once no back-off holds them; raises RetryableError."""
        memory = look.memory
        if memory.problem is not None and self._clock() < memory.retry_at:
            raise memory.problem
        try:
            child = await self._create(look, config)
        except RetryableError as problem:
            self.postpone(memory, problem)
            logger.warning("attempt not created: %s", problem.message, extra=look.log)
            raise
        self.forgive(memory)
        logger.info("attempt created", extra=look.log)
        return child

    async def remove(self, look: Look, child: ChildObservation) -> None:
        """Delete the objects of an attempt that ended; the pods follow."""
        await delete_config_map(self._cluster, look.key.namespace, child.name, look.uid)
        await self._backend.delete(look.key.namespace, child)
        logger.info("attempt removed", extra=look.log)

    def postpone(self, memory: JobMemory, problem: RetryableError) -> None:
        """Keep ``problem``, and when to try again: after 10 s, doubled up to 5 min."""
        memory.failures += 1
        memory.problem = problem
        memory.retry_at = self._clock() + backoff_seconds(memory.failures, jitter=0, base=FIRST_RETRY_SECONDS)

    def forgive(self, memory: JobMemory) -> None:
        """Forget what stood in the way: it is gone, or it stood in the way of an attempt that has ended since."""
        memory.problem, memory.failures = None, 0

    def seconds_to_retry(self, memory: JobMemory) -> float:
        """Return how long the back-off lasts."""
        return max(0.0, memory.retry_at - self._clock())

    async def _create(self, look: Look, config: RunConfig) -> ChildObservation:
        """Create ConfigMap, then child, under names that a second try finds again."""
        metadata, number = look.job.metadata, look.stored.attempts.started
        if number > 1:
            # Its child went without us, or was never created: then the ConfigMap has stayed.
            before = attempt_name(metadata.name, metadata.uid, number - 1)
            await delete_config_map(self._cluster, metadata.namespace, before, metadata.uid)
        name = attempt_name(metadata.name, metadata.uid, number)
        plan = AttemptSpec(number=number, name=name, image=self.image(look), report_base_url=self._report_base_url)
        await create_config_map(self._cluster, build_config_map(look.job, plan, config, self._ca_bundle()))
        return await self._backend.create(self._backend.build(look.job, plan))
