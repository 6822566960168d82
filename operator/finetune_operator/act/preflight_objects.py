"""Runs the check before attempt 1: reads its pods, asks `preflight` what comes next, creates and removes its objects.
Called by `reconcile` until an attempt is opened."""

from __future__ import annotations

import logging
from collections.abc import Callable

from finetune_core.api.conditions import Reason
from finetune_core.contract import RunConfig
from finetune_core.names import preflight_name
from finetune_operator import messages
from finetune_operator.act.attempt_objects import AttemptObjects
from finetune_operator.act.config_maps import create_config_map, delete_config_map
from finetune_operator.decide.preflight import Check, Next, Situation, check
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.labels import JOB_UID, PREFLIGHT
from finetune_operator.objects.observations import PodObservation, controller_uid, parse_preflight_pod
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_config_map, build_preflight_pod
from finetune_operator.observe.hints import HintReader
from finetune_operator.observe.record import Look
from finetune_operator.queue.retryable import RetryableError

logger = logging.getLogger(__name__)


class Preflights:
    """Makes and removes what a check consists of."""

    def __init__(
        self,
        cluster: KubeClient,
        hints: HintReader,
        objects: AttemptObjects,
        *,
        is_default: bool,
        clock: Callable[[], float],
    ) -> None:
        """Check where a job says so, and with ``is_default`` also where it says nothing."""
        self._cluster = cluster
        self._hints = hints
        self._objects = objects
        self._is_default = is_default
        self._clock = clock

    async def look(self, look: Look, *, can_open: bool) -> Check:
        """Return the next step of the check; ``can_open``: nothing else holds attempt 1 back."""
        record, memory = look.stored.preflight, look.memory
        # Without a record no pod can exist: it is written first.
        pods = await self._pods(look) if record is not None else []
        current = next((pod for pod in pods if record is not None and pod.index == record.tries + 1), None)
        await self._hints.read_pod(memory, look.key.namespace, current, look.now)
        policy = look.job.spec.run_policy
        runs = policy.preflight == "Run" or (policy.preflight is None and self._is_default)
        situation = Situation(
            now=look.now,
            policy=policy,
            is_wanted=can_open and runs,
            pods=pods,
            hint=memory.hint,
            problem=memory.problem.message if memory.problem is not None and current is None else "",
        )
        return check(record, situation)

    async def act(self, look: Look, step: Check, config: RunConfig | None) -> float | None:
        """Create or remove what ``step`` says; return when to look again, None where ``step`` knows."""
        if step.next is Next.REMOVE:
            for pod in step.leftovers:
                await self._remove(look, pod)
            return 0
        if step.next is not Next.CREATE or config is None:
            return None
        memory = look.memory
        if memory.problem is None or self._clock() >= memory.retry_at:
            try:
                await self._create(look, step.number, config)
            except RetryableError as problem:
                self._objects.postpone(memory, problem)
                logger.warning("preflight pod not created: %s", problem.message, extra=look.log)
                return 0  # so that the cause is written
            self._objects.forgive(memory)
            logger.info("preflight pod of try %d created", step.number, extra=look.log)
            return None
        return self._objects.seconds_to_retry(memory)

    async def _pods(self, look: Look) -> list[PodObservation]:
        manifests = await self._cluster.list_pods(look.key.namespace, f"{JOB_UID}={look.uid},{PREFLIGHT}")
        return [pod for manifest in manifests if (pod := parse_preflight_pod(manifest)) is not None]

    async def _create(self, look: Look, number: int, config: RunConfig) -> None:
        """Create ConfigMap, then pod, under names that a second try finds again."""
        if number > 1:
            # Its pod may have gone without us: then the ConfigMap has stayed.
            before = preflight_name(look.key.name, look.uid, number - 1)
            await delete_config_map(self._cluster, look.key.namespace, before, look.uid)
        name = preflight_name(look.key.name, look.uid, number)
        plan = PreflightSpec(number=number, name=name, image=self._objects.image(look))
        try:
            await create_config_map(self._cluster, build_preflight_config_map(look.job, plan, config))
        except RetryableError as error:
            raise RetryableError(Reason.OUTSIDE_FAILURE, error.message) from error
        pod = build_preflight_pod(look.job, plan)
        try:
            await self._cluster.create_pod(pod)
        except ApiError as error:
            if error.is_conflict:
                await self._accept_existing(look, pod)
            elif error.is_refusal:
                message = messages.backend_refused("Pod", name, error.message)
                raise RetryableError(Reason.OUTSIDE_FAILURE, message) from error
            else:
                raise

    async def _accept_existing(self, look: Look, pod: Manifest) -> None:
        """An earlier try to create the pod did, or somebody else's stands in its place."""
        found = await self._cluster.list_pods(look.key.namespace, f"{JOB_UID}={look.uid},{PREFLIGHT}")
        ours = [item for item in found if item["metadata"]["name"] == pod["metadata"]["name"]]
        if not ours or controller_uid(ours[0]) != look.uid:
            message = messages.name_conflict("Pod", pod["metadata"]["name"])
            raise RetryableError(Reason.OUTSIDE_FAILURE, message)

    async def _remove(self, look: Look, pod: PodObservation) -> None:
        """Delete the objects of a try."""
        await delete_config_map(self._cluster, look.key.namespace, pod.name, look.uid)
        await self._cluster.delete_pod(look.key.namespace, pod.name, pod.uid)
        logger.info("preflight pod of try %d removed", pod.index, extra=look.log)
