"""Reads what exists for a job: the child of its newest attempt and the pods of all attempts. Called by `reconcile`;
tells the memory of reports which pods may report."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name
from finetune_operator.decide.attempts import World
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.labels import JOB_UID
from finetune_operator.objects.observations import ChildObservation, PodObservation, parse_pod
from finetune_operator.observe.record import Look
from finetune_operator.observe.usage import account
from finetune_operator.observe.waiting import attempt_detail
from finetune_operator.queue.memory import Memory, ReportingAttempt


class Observer:
    """Turns the API server's objects into the values that decisions are made from."""

    def __init__(self, cluster: KubeClient, backend: Backend, memory: Memory) -> None:
        """Read with ``cluster`` and ``backend``."""
        self._cluster = cluster
        self._backend = backend
        self._memory = memory

    async def observe(self, look: Look) -> World:
        """Return the world as it is for this job."""
        pods = await self._pods(look)
        # After the pods: a child that has not failed yet proves that its backend has not begun to clean up.
        child = await self._child(look)
        if child is not None and child.finished and not any(pod.ended for pod in pods):
            # It ended between the two reads, and nothing that was read before explains how: its pods do, now.
            pods = await self._pods(look)
        self._expect_reports(look, pods)
        report = look.memory.report
        recorded = look.stored.child
        return World(
            now=look.now,
            nodes=look.job.spec.resources.nodes,
            policy=look.job.spec.run_policy,
            child=child,
            child_uid=recorded.uid if recorded and look.stored.attempts.current else "",
            pods=pods,
            checkpoints=look.stored.checkpoints,
            usage=account(look.stored.usage, pods, gpus=look.job.spec.resources.gpus_per_node, now=look.now),
            waiting_for=_waiting_for(look, pods),
            final_result=report.result if report else None,
            last_phase=report.phase.value if report else "",
        )

    async def _pods(self, look: Look) -> list[PodObservation]:
        if not look.stored.attempts.started:
            return []
        manifests = await self._cluster.list_pods(look.key.namespace, f"{JOB_UID}={look.uid}")
        return [pod for manifest in manifests if (pod := parse_pod(manifest)) is not None]

    async def _child(self, look: Look) -> ChildObservation | None:
        """Return the child of the newest attempt. Somebody else's does not count: creating ours will say so."""
        started = look.stored.attempts.started
        if not started:
            return None
        name = attempt_name(look.key.name, look.uid, started)
        child = await self._backend.observe(look.key.namespace, name)
        return child if child is not None and child.owner_uid == look.uid else None

    def _expect_reports(self, look: Look, pods: list[PodObservation]) -> None:
        """Tell the report server whose reports count: those of the newest attempt, also while its last pods save."""
        attempts = look.stored.attempts
        uids = frozenset(pod.uid for pod in pods if pod.attempt == attempts.started)
        if attempts.current is None and not uids:
            self._memory.stop_reporting(look.key)
            return
        resources = look.job.spec.resources
        ranks = resources.nodes * max(1, resources.gpus_per_node)
        reporting = ReportingAttempt(uid=look.uid, attempt=attempts.started, pod_uids=uids, ranks=ranks)
        self._memory.set_reporting_attempt(look.key, reporting)


def _waiting_for(look: Look, pods: Sequence[PodObservation]) -> str:
    """Return what the attempt waits for: what the status says, unless its pods say something newer."""
    stored = {condition.type: condition.message for condition in look.stored.conditions if condition.status == "False"}
    own = [pod for pod in pods if pod.attempt == look.stored.attempts.started]
    if own and ConditionType.ACCEPTED not in stored:
        return attempt_detail(own, look.job.spec.resources.nodes, look.memory.hint)
    return stored.get(ConditionType.ACCEPTED) or stored.get(ConditionType.RUNNING, "")
