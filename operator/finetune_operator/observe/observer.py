"""Reads what exists for a job: the child of its newest attempt, the pods of all attempts, preflight pods, warnings, and
the job that `model.adapter.job` names.

`reconcile.py` calls `Observer.observe` in each reconcile of a job that has not ended, unless this version can't read
enough of the job's status. The observer also stores in memory which pods may send reports, so that the report server
can refuse reports of other pods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.layout import runs_folder_of
from finetune_core.names import attempt_name
from finetune_core.planning.training_plan import process_share
from finetune_core.resolve import planned_size
from finetune_core.training_choices import with_choices
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.disk_space import model_room
from finetune_operator.objects.labels import JOB_UID, PREFLIGHT
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.committed_checkpoints import known_checkpoints
from finetune_operator.observe.named_job import NamedJob, awaited_name, named_adapter, read_named_job
from finetune_operator.observe.observation import BatchObservation, JobObservation, PreflightObservation
from finetune_operator.observe.ownership import newest_attempt, pods_of_attempts, preflight_pods
from finetune_operator.observe.stored_job import ParsedJob, StoredJob
from finetune_operator.observe.usage import usage_until
from finetune_operator.observe.waiting import why_attempt_waits
from finetune_operator.observe.warning_events import WarningReader
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory, ReportingAttempt

MOST_WAITING = 16
"""Largest number of jobs, each of which waits for the adapter of the next one, that are read to find a circle."""


class Observer:
    """Reads a job's objects from the API server and returns them as the values from which decisions are made."""

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
        self._clock = clock
        self._warnings = WarningReader(cluster, clock)

    async def observe(self, job: StoredJob) -> JobObservation:
        """Read what exists for ``job`` now and return it. Also updates in memory which pods may send reports."""
        manifests = await self._list_pods(job)
        # The child is read after the pods. After a failure, training-operator marks the child as failed before it
        # deletes the other pods. So if the child has not failed, the backend deleted none of these pods for a failure.
        found = await self._find_child(job)
        pods = pods_of_attempts(manifests, job, self._backend, found)
        # An object of another owner that has the name of the child becomes a problem only later, when the API server
        # answers 409 to the creation of the child.
        child = found if found is not None and found.owner_uid == job.uid else None
        if child is not None and child.finished and not any(pod.ended for pod in pods):
            # The pods are read again. The child may have ended between the two reads, and the pods of the first read
            # do not show why.
            pods = pods_of_attempts(await self._list_pods(job), job, self._backend, found)
        pods = self._with_start_errors(job, pods)
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
            nodes=job.resources.nodes,
            policy=job.policy,
            child=child,
            child_uid=recorded.uid if recorded else "",
            pods=pods,
            undeletable=frozenset(job.memory.undeletable_pods),
            checkpoints=known_checkpoints(job.status.checkpoints, report),
            usage=usage_until(job.now, job.status.usage, pods, gpus=job.resources.gpus_per_node),
            waiting_for=waiting_for,
            final_result=report.result if report else None,
            last_phase=report.phase.value if report else "",
            batch=_batch(job),
            warning=job.memory.hint,
            preflight=preflight,
            named_job=await self._named_job(job),
        )

    async def _named_job(self, job: StoredJob) -> NamedJob | None:
        """Return the job that `model.adapter.job` names, as long as its artifact is not recorded in the status."""
        source = named_adapter(job)
        if source is None or source.job is None:
            return None
        key = Key.parse(job.key.namespace, source.job.name)
        found = await self._cluster.get_job(key) if key is not None else None
        return read_named_job(job, source, found, job.now, waits_for_it=await self._waits_for(job, found))

    async def _waits_for(self, job: StoredJob, found: Manifest | None) -> bool:
        """Return whether the job ``found`` waits for ``job``, because each job of a chain names the next one in
        `model.adapter.job`. Of a longer chain than MOST_WAITING only the beginning is read."""
        for _ in range(MOST_WAITING):
            name = awaited_name(found, job.now)
            key = Key.parse(job.key.namespace, name) if name else None
            if key is None or key == job.key:
                return key is not None
            found = await self._cluster.get_job(key)
        return False

    async def count_attempts(self, job: StoredJob) -> StoredJob:
        """Return ``job`` with `status.attempts.started` raised to the highest attempt number that its objects show.

        `reconcile.py` calls this method where an order to cancel or suspend is to be obeyed although a part of the
        status, such as the attempts, can't be read. With the number, the operator finds the pods that the order ends.
        """
        pods = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid}")
        started = max(job.status.attempts.started, newest_attempt(pods, job, self._backend))
        attempts = job.status.attempts.model_copy(update={"started": started})
        return replace(job, status=job.status.model_copy(update={"attempts": attempts}))

    async def _list_pods(self, job: StoredJob) -> list[Manifest]:
        """Return all pods with the uid of the job as a label; none where the job has had no attempt."""
        if not job.status.attempts.started:
            return []
        return await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid}")

    async def _find_child(self, job: StoredJob) -> ChildObservation | None:
        """Return the object with the name of the newest attempt's child, whoever owns it; None where none exists."""
        started = job.status.attempts.started
        if not started:
            return None
        return await self._backend.observe(job.key.namespace, attempt_name(job.key.name, job.uid, started))

    async def _preflight(self, job: StoredJob) -> PreflightObservation:
        """Return what exists of the preflight check, and read warning events about the pod of the current try."""
        record, policy, pods = job.status.preflight, job.policy, []
        # Without a record no pod needs to be read: the record is written before the first pod is created, and is
        # removed only once every pod is being deleted. The record may exist and be unreadable.
        if record is not None or job.unread_bookkeeping:
            manifests = await self._cluster.list_pods(job.key.namespace, f"{JOB_UID}={job.uid},{PREFLIGHT}")
            pods = preflight_pods(manifests, job)
        current = next((pod for pod in pods if record is not None and pod.index == record.tries + 1), None)
        await self._warnings.read_for_pod(job, current)
        problem = job.memory.problem
        if problem is not None and problem.reason is Reason.BAD_INPUT:
            problem = None  # it does not say why the pod could not be created
        return PreflightObservation(
            enabled=policy.preflight == "Run" or (policy.preflight is None and self._preflight_by_default),
            pods=pods,
            problem=problem.message if problem is not None and current is None else "",
            job_uid=job.uid,
            chosen_run_id=(job.resource.spec.storage.run_id or "") if isinstance(job, ParsedJob) else "",
            runs_folder=runs_folder_of(job.resource) if isinstance(job, ParsedJob) else "",
            model_room=model_room(job.resource) if isinstance(job, ParsedJob) else None,
        )

    def _with_start_errors(self, job: StoredJob, pods: Sequence[PodObservation]) -> list[PodObservation]:
        """Return ``pods`` with the seconds for which each pod has waited with an error of its container runtime.

        The status of a pod does not contain this time, so the operator measures it. After a restart of the operator the
        measurement starts at 0.
        """
        now, known = self._clock(), job.memory.start_errors
        stuck = {pod.uid for pod in pods if pod.container is not None and pod.container.waits_for_runtime}
        job.memory.start_errors = {uid: known.get(uid, now) for uid in stuck}
        return [
            replace(pod, start_error_seconds=now - job.memory.start_errors[pod.uid]) if pod.uid in stuck else pod
            for pod in pods
        ]

    def _expect_reports(self, job: StoredJob, pods: Sequence[PodObservation]) -> None:
        """Store in memory which pods may send reports: the pods of the newest attempt.

        The pods of an attempt that has ended may report until no pod is left, because they may still save a checkpoint.
        """
        attempts = job.status.attempts
        uids = frozenset(pod.uid for pod in pods if pod.attempt == attempts.started)
        if attempts.current is None and not uids:
            self._memory.stop_reporting(job.key, job.uid)
            return
        ranks = job.resources.processes
        reporting = ReportingAttempt(uid=job.uid, attempt=attempts.started, pod_uids=uids, ranks=ranks)
        self._memory.set_reporting_attempt(job.key, job.uid, reporting)


def _batch(job: StoredJob) -> BatchObservation | None:
    if not isinstance(job, ParsedJob):
        return None
    spec, plan = job.resource.spec, job.status.plan
    return BatchObservation(
        planned=planned_size(with_choices(spec, plan.choices if plan is not None else None)),
        share=process_share(spec.training.global_batch_size, spec.resources.processes),
        packed=spec.dataset.packing,
        on_gpus=spec.resources.device == "GPU",
        advice=plan.advice if plan is not None else "",
    )


def _waiting_for(job: StoredJob, pods: Sequence[PodObservation]) -> str:
    """Return, as a sentence, what the attempt waits for.

    The sentence is made from the attempt's pods. Where the attempt has no pods, or where the job is not accepted, the
    result is the message of the stored condition `Accepted` or else `Running`, if that condition is False. The result
    is empty where there is no such message.
    """
    stored = {condition.type: condition.message for condition in job.status.conditions if condition.status == "False"}
    own = [pod for pod in pods if pod.attempt == job.status.attempts.started]
    if own and ConditionType.ACCEPTED not in stored:
        return why_attempt_waits(own, job.resources.nodes, job.memory.hint)
    return stored.get(ConditionType.ACCEPTED) or stored.get(ConditionType.RUNNING, "")
