"""Reads what exists for a job: the child of its newest attempt, the pods of all attempts, preflight pods and warnings.

`reconcile.py` calls `Observer.observe` once for each reconcile. The observer also records in the memory which pods may
report, so that the report server can refuse reports of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.labels import JOB_UID, PREFLIGHT
from finetune_operator.objects.observations import ChildObservation, PodObservation, parse_pod, parse_preflight_pod
from finetune_operator.observe.observation import JobObservation, PreflightObservation
from finetune_operator.observe.stored_job import ParsedJob
from finetune_operator.observe.usage import usage_until
from finetune_operator.observe.waiting import why_attempt_waits
from finetune_operator.observe.warning_events import WarningReader
from finetune_operator.queue.memory import Memory, ReportingAttempt


class Observer:
    """Turns the objects of the API server into the values that decisions are made from."""

    def __init__(
        self,
        cluster: KubeClient,
        backend: Backend,
        memory: Memory,
        *,
        preflight_by_default: bool,
        clock: Callable[[], float],
    ) -> None:
        """Read with ``cluster`` and ``backend``; ``clock`` returns monotonic seconds.

        ``preflight_by_default`` says whether a job without `runPolicy.preflight` is checked before attempt 1.
        """
        self._cluster = cluster
        self._backend = backend
        self._memory = memory
        self._preflight_by_default = preflight_by_default
        self._warnings = WarningReader(cluster, clock)

    async def observe(self, job: ParsedJob) -> JobObservation:
        """Return what exists for ``job`` now."""
        pods = await self._pods(job)
        # The child is read after the pods: if it has not failed even then, the backend had deleted none of these pods.
        child = await self._child(job)
        if child is not None and child.finished and not any(pod.ended for pod in pods):
            # The child ended between the two reads, so the pods that were read first do not explain its end.
            pods = await self._pods(job)
        self._expect_reports(job, pods)
        waiting_for = _waiting_for(job, pods)
        if job.status.attempts.started:
            preflight = PreflightObservation()
            await self._warnings.read_for_attempt(job, child, pods)
        else:
            preflight = await self._preflight(job)
        report = job.memory.report
        recorded = job.status.child if job.status.attempts.current is not None else None
        return JobObservation(
            now=job.now,
            nodes=job.resource.spec.resources.nodes,
            policy=job.resource.spec.run_policy,
            child=child,
            child_uid=recorded.uid if recorded else "",
            pods=pods,
            checkpoints=job.status.checkpoints,
            usage=usage_until(job.now, job.status.usage, pods, gpus=job.resource.spec.resources.gpus_per_node),
            waiting_for=waiting_for,
            final_result=report.result if report else None,
            last_phase=report.phase.value if report else "",
            warning=job.memory.hint,
            preflight=preflight,
        )

    async def _pods(self, job: ParsedJob) -> list[PodObservation]:
        """Return the pods of all attempts."""
        if not job.status.attempts.started:
            return []
        manifests = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid}")
        return [pod for manifest in manifests if (pod := parse_pod(manifest)) is not None]

    async def _child(self, job: ParsedJob) -> ChildObservation | None:
        """Return the child of the newest attempt; None also where an object of that name belongs to another owner.

        A foreign object is reported later, when the child is created and the API server answers 409.
        """
        started = job.status.attempts.started
        if not started:
            return None
        name = attempt_name(job.key.name, job.uid, started)
        child = await self._backend.observe(job.key.namespace, name)
        return child if child is not None and child.owner_uid == job.uid else None

    async def _preflight(self, job: ParsedJob) -> PreflightObservation:
        """Return what exists of the preflight check, and read the warning events about the pod of its current try."""
        record, policy, pods = job.status.preflight, job.resource.spec.run_policy, []
        if record is not None:  # the record is written before the first pod is created, so without it no pod exists
            manifests = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid},{PREFLIGHT}")
            pods = [pod for manifest in manifests if (pod := parse_preflight_pod(manifest)) is not None]
        current = next((pod for pod in pods if record is not None and pod.index == record.tries + 1), None)
        await self._warnings.read_for_pod(job, current)
        problem = job.memory.problem
        return PreflightObservation(
            enabled=policy.preflight == "Run" or (policy.preflight is None and self._preflight_by_default),
            pods=pods,
            problem=problem.message if problem is not None and current is None else "",
        )

    def _expect_reports(self, job: ParsedJob, pods: Sequence[PodObservation]) -> None:
        """Record which pods may report: those of the newest attempt, also while its last pods still save."""
        attempts = job.status.attempts
        uids = frozenset(pod.uid for pod in pods if pod.attempt == attempts.started)
        if attempts.current is None and not uids:
            self._memory.stop_reporting(job.key)
            return
        resources = job.resource.spec.resources
        ranks = resources.processes
        reporting = ReportingAttempt(uid=job.uid, attempt=attempts.started, pod_uids=uids, ranks=ranks)
        self._memory.set_reporting_attempt(job.key, reporting)


def _waiting_for(job: ParsedJob, pods: Sequence[PodObservation]) -> str:
    """Return why the attempt's pods do not all run: what the pods themselves show, else the stored conditions."""
    stored = {condition.type: condition.message for condition in job.status.conditions if condition.status == "False"}
    own = [pod for pod in pods if pod.attempt == job.status.attempts.started]
    if own and ConditionType.ACCEPTED not in stored:
        return why_attempt_waits(own, job.resource.spec.resources.nodes, job.memory.hint)
    return stored.get(ConditionType.ACCEPTED) or stored.get(ConditionType.RUNNING, "")
