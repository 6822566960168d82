"""Brings one FineTuneJob a step further: observe, decide, and then act on the decision and write the status.

The workers of `controller.py` call `Reconciler.reconcile` with the key of a job. Each call writes the status at most
once: where the decision must be written before objects change, one call only writes it, and the next call acts on it.
Each call creates or deletes objects for at most one attempt or the preflight check, but a call that creates an attempt
also deletes what is left of the previous attempt. A crash after any write is harmless, because the next call starts
from what the API server holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.contract import ReportConfig, RunConfig, report_path
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from finetune_core.validation.runnable import unrunnable
from finetune_operator import messages
from finetune_operator.act.attempt_objects import AttemptObjects
from finetune_operator.act.backoff import CreationBackoff
from finetune_operator.act.checkpoint_annotations import CheckpointAnnotations
from finetune_operator.act.network_policies import NetworkPolicies
from finetune_operator.act.preflight_objects import PreflightObjects
from finetune_operator.act.preflight_turns import PreflightTurns
from finetune_operator.decide.decision import Action, Decision, JobEnd
from finetune_operator.decide.failed_nodes import nodes_to_avoid
from finetune_operator.decide.preflight import waits_for_turn
from finetune_operator.decide.state_machine import decide
from finetune_operator.kube.api_errors import REQUEST_ERRORS
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.observe.observation import JobObservation
from finetune_operator.observe.observer import Observer
from finetune_operator.observe.stored_job import ParsedJob, StoredJob, parse_spec, parse_stored_job
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.preflight_slots import PreflightSlots
from finetune_operator.queue.requeue import Requeue, Write
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS, RetryableError
from finetune_operator.settled import SettledJobs
from finetune_operator.status.event_recorder import EventRecorder
from finetune_operator.status.inputs import choices_of, refused_input, status_input
from finetune_operator.status.writer import StatusWriter

RUNNING_RESYNC_SECONDS = 60.0
"""Largest number of seconds between two reconciles of a job whose attempt runs or whose child is suspended. So even
where a watch event is lost, the operator acts within a minute."""
RETRY_SECONDS = 10.0
"""Seconds until the next reconcile of a job after a status write that changed nothing, although the write was needed
before a change of the job's objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Acted:
    """What came of creating or deleting the objects that a decision names."""

    child: ChildObservation | None = None
    """The child object as it is after the action; None where it does not exist or was deleted by the action."""
    problem: RetryableError | None = None
    """Why the attempt's objects could not be created; None where nothing failed."""
    missing: str = ""
    """Why the preflight pod could not be created; empty where nothing failed."""
    retry_seconds: float | None = None
    """Seconds until the next try to create the objects that could not be created; None where nothing failed."""
    removed: Write | None = None
    """The deletion of preflight pods, after which the next step of the check is due at once. None where no pod was
    deleted."""


class Reconciler:
    """Reconciles jobs, one in each call. What is kept in memory between calls, such as back-offs, may be lost."""

    def __init__(
        self,
        *,
        cluster: KubeClient,
        backend: Backend,
        memory: Memory,
        metrics: Metrics,
        trainer_image: str,
        report_base_url: str,
        ca_bundle: Callable[[], str],
        instance: str,
        preflight: str,
        preflight_slots: PreflightSlots | None = None,
        namespaces: Sequence[str] = (),
        checkpoint_annotations: bool = True,
        network_policies: bool = True,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the parts. ``now`` returns the wall-clock time, ``clock`` monotonic seconds.

        ``trainer_image`` is the image of jobs that name no image. ``report_base_url`` is the address of the report
        server, and ``ca_bundle`` returns its CA certificates. ``instance`` is the name of the operator's pod.
        ``preflight`` ("Run" or "Skip") applies to jobs without `runPolicy.preflight`. ``preflight_slots`` limits how
        many checks run at the same time, over all jobs in ``namespaces``; an empty ``namespaces`` means all namespaces.
        ``checkpoint_annotations`` and ``network_policies`` say whether pods are annotated with the time of the newest
        checkpoint, and whether attempts get NetworkPolicies.
        """
        self._cluster = cluster
        self._memory = memory
        self._metrics = metrics
        self._trainer_image = trainer_image
        self._report_base_url = report_base_url
        self._now = now
        self._child_kind = backend.kind
        self._backoff = CreationBackoff(clock)
        self._observer = Observer(cluster, backend, memory, preflight_by_default=preflight == "Run", clock=clock)
        policies = NetworkPolicies(cluster, enabled=network_policies)
        self._attempt_objects = AttemptObjects(
            cluster=cluster,
            backend=backend,
            backoff=self._backoff,
            network_policies=policies,
            report_base_url=report_base_url,
            ca_bundle=ca_bundle,
        )
        self._preflight_objects = PreflightObjects(cluster, self._backoff)
        self._preflight_turns = PreflightTurns(cluster, preflight_slots or PreflightSlots(clock=clock), namespaces)
        recorder = EventRecorder(cluster, instance=instance, now=now, clock=clock)
        self._writer = StatusWriter(
            cluster=cluster, recorder=recorder, metrics=metrics, child_kind=backend.kind, clock=clock
        )
        self._settled_jobs = SettledJobs(
            cluster, backend, self._writer, policies, self._preflight_objects, self._attempt_objects
        )
        self._annotations = CheckpointAnnotations(cluster, enabled=checkpoint_annotations, clock=clock)

    async def reconcile(self, key: Key) -> Requeue:
        """Bring the job ``key`` a step further, and return when to call again.

        Raises one of `REQUEST_ERRORS` where a request fails, for example ApiError (409) where the job has changed since
        it was read.
        """
        self._memory.begin_reconcile(key)
        manifest = await self._cluster.get_job(key)
        if manifest is None or "deletionTimestamp" in manifest["metadata"]:
            return self._forget(key)
        stored = self._parse(key, manifest)
        if stored.has_ended:
            return await self._tidy(stored)
        if stored.unread_bookkeeping:
            if not (stored.policy.cancel or stored.policy.suspend):
                return await self._refuse_for_now(stored, messages.unreadable_status(stored.unread_bookkeeping))
            # An order to cancel or suspend is obeyed with what could be read, because it ends pods and starts none.
            stored = await self._observer.count_attempts(stored)
        job, invalid = _parse_spec(stored)

        seen = await self._observer.observe(job or stored)
        if seen.child is None and self._has_foreign_child(stored):
            return await self._refuse_for_now(stored, messages.unreadable_status("child.kind"))
        decision = decide(stored.status, seen)
        self._preflight_turns.observe(key, stored.status, seen, decision)
        if job is None:
            if decision.starts_pods or decision.starts_check(stored.status):
                return await self._refuse_for_now(stored, invalid)
            return await self._carry_out(stored, seen, decision, image=None, invalid=invalid)
        try:
            config = self._run_config(job, decision)
        except UserError as error:
            return await self._refuse(job, str(error))
        # A spec or status that was refused before can be used now, so the back-off after that refusal ends.
        self._backoff.forget_refusal(job.memory)
        asks = decision.starts_check(job.status) and not self._backoff.holds(job.memory)
        # The job waits for its turn before the check is recorded in the status, because the pending deadline runs from
        # the time of that record on.
        if asks and not await self._preflight_turns.has_come(key, job.now):
            decision = waits_for_turn(decision, job.status, self._preflight_turns.limit)
        image = job.status.image or job.resource.spec.pod_template.image or self._trainer_image
        return await self._carry_out(job, seen, decision, image=image, invalid=invalid, config=config)

    async def _carry_out(
        self,
        job: StoredJob,
        seen: JobObservation,
        decision: Decision,
        *,
        image: str | None,
        invalid: str,
        config: RunConfig | None = None,
    ) -> Requeue:
        """Act on ``decision``, and write the status. A decision that must be written first is only written, and the
        next reconcile acts on the decision.

        ``image`` is the image of the job's pods; None where this version can't read the spec. ``invalid`` says why this
        version can't run or read the spec; empty where it can. ``config`` is the run file; None where no pod is about
        to start.
        """
        if decision.must_be_written_first(job.status):
            given = status_input(job, seen, decision, image=image, invalid=invalid, config=config)
            write = await self._writer.write_now(job, given)
            if decision.action is Action.OPEN_ATTEMPT:
                self._backoff.reset(job.memory)
            return Requeue(write=write, pause=RETRY_SECONDS)

        acted = await self._act(job, seen, decision, image, config)
        decision = replace(decision, missing=acted.missing or decision.missing)

        given = status_input(
            job,
            seen,
            decision,
            image=image,
            invalid=invalid,
            config=config,
            created=acted.child,
            problem=acted.problem,
        )
        left = await self._writer.write(job, given)
        await self._annotations.update(job, seen.pods)
        waits = (acted.retry_seconds, decision.wait_seconds, left, self._resync(job, decision, acted))
        return Requeue(write=acted.removed, pause=_earliest(*waits))

    # ---- before the decision: forget a deleted job, parse the stored job, tidy up after an ended job ----

    def _forget(self, key: Key) -> Requeue:
        """Drop the memory and metrics of a deleted job. The garbage collector removes the objects that the job owns."""
        self._memory.forget(key)
        self._preflight_turns.forget(key)
        self._metrics.jobs.remove(key)
        return Requeue(gone=True)

    def _parse(self, key: Key, manifest: dict[str, Any]) -> StoredJob:
        memory = self._memory.job(key, manifest["metadata"]["uid"])
        stored = parse_stored_job(key, manifest, memory, self._now())
        set_log_fields(**stored.log_fields)
        stored.memory.resource_version = manifest["metadata"]["resourceVersion"]
        return stored

    async def _tidy(self, stored: StoredJob) -> Requeue:
        """Remove those objects of an ended job whose removal is due, and accept no more reports of the job."""
        self._memory.set_reporting_attempt(stored.key, stored.uid, None)
        self._preflight_turns.forget(stored.key)
        self._metrics.jobs.update(stored.key, stored.manifest.get("spec") or {}, stored.status)
        requeue = Requeue(pause=await self._settled_jobs.tidy(stored))
        # Until its next event, or until the pause is over, the job needs no reconcile: not even at a resync.
        stored.memory.settled_version = stored.memory.resource_version
        return requeue

    def _has_foreign_child(self, stored: StoredJob) -> bool:
        """Return whether another version runs the current attempt by a child of a kind that this version does not know.

        In that case the lack of a PyTorchJob says nothing about the attempt. The result is False where `runPolicy`
        orders to cancel or suspend the job, because such an order is obeyed in any case.
        """
        child = stored.status.child
        if child is None or stored.status.attempts.current is None or stored.policy.cancel or stored.policy.suspend:
            return False
        return child.kind not in ("", self._child_kind)

    # ---- around the decision: the run file, and when to reconcile again ----

    def _run_config(self, job: ParsedJob, decision: Decision) -> RunConfig | None:
        """Return the run file where pods are about to start, else None; raise UserError if the spec can't be run."""
        if not decision.needs_run_file:
            return None
        # The preflight check comes before attempt 1 exists, but reads the run file of attempt 1.
        number = max(1, decision.attempts.started)
        path = report_path(job.key.namespace, job.key.name, number)
        report = ReportConfig(url=self._report_base_url + path)
        began = job.status.start_time or job.now
        return resolve(
            job.resource,
            report=report,
            preflight=decision.preflight,
            adapter=job.status.adapter,
            today=began.date(),
            halvings=decision.attempts.memory_halvings,
            choices=choices_of(job.status.plan, decision.planned),
        )

    def _resync(self, job: StoredJob, decision: Decision, acted: _Acted) -> float | None:
        """Return in how many seconds to reconcile the job again for its current attempt, even without a watch event.

        None where no attempt is current. Also None where the objects of the attempt could not be created, because the
        back-off then says when to try again.
        """
        if acted.problem is not None:
            return None
        current = decision.attempts.current
        if current is None:
            return None
        held = acted.child is not None and acted.child.suspended
        if held or job.condition_is(ConditionType.RUNNING, "True"):
            return RUNNING_RESYNC_SECONDS
        age = (job.now - current.start_time).total_seconds()
        return EVENTS_AFTER_SECONDS if age < EVENTS_AFTER_SECONDS else EVENTS_EVERY_SECONDS

    # ---- the action: create and delete objects ----

    async def _act(
        self, job: StoredJob, seen: JobObservation, decision: Decision, image: str | None, config: RunConfig | None
    ) -> _Acted:
        """Create or delete the objects that ``decision.action`` names, and return what came of it.

        The stored status already contains what must be written first (`Decision.must_be_written_first`).
        """
        match decision.action:
            case Action.CREATE_ATTEMPT if isinstance(job, ParsedJob) and image and config is not None:
                try:
                    avoided = nodes_to_avoid(job.status.attempts.recent)
                    return _Acted(child=await self._attempt_objects.create(job, image, config, avoided))
                except RetryableError as problem:
                    return _Acted(problem=problem, retry_seconds=self._backoff.seconds_left(job.memory))
            case Action.REMOVE_ATTEMPT if seen.child is not None:
                await self._attempt_objects.remove(job, seen.child)
                return _Acted()
            case Action.REMOVE_ORPHANS:
                await self._attempt_objects.remove_orphans(job, decision.orphans)
                return _Acted()
            case Action.CREATE_PREFLIGHT_POD if isinstance(job, ParsedJob) and image and config is not None:
                return await self._create_preflight_pod(job, decision.number_of_try, image, config)
            case Action.REMOVE_PREFLIGHT_PODS:
                return _Acted(removed=await self._preflight_objects.remove(job, decision.preflight_pods))
        return _Acted(child=seen.child)

    async def _create_preflight_pod(self, job: ParsedJob, number: int, image: str, config: RunConfig) -> _Acted:
        """Create the preflight pod of try ``number``, and return what came of it.

        Where the pod can't be created, the slot of the job is given to other jobs.
        """
        try:
            await self._preflight_objects.create(job, number, image, config)
        except RetryableError as problem:
            self._preflight_turns.forget(job.key)
            return _Acted(missing=problem.message, retry_seconds=self._backoff.seconds_left(job.memory))
        except REQUEST_ERRORS:
            # The slot is given to other jobs, because a webhook may answer 409 for ever. If the pod exists
            # nevertheless, the next reconcile sees the pod and occupies a slot again.
            self._preflight_turns.forget(job.key)
            raise
        return _Acted()

    # ---- specs that can't be read or run, and statuses that can't be read ----

    async def _refuse(self, job: ParsedJob, message: str) -> Requeue:
        """Record that the spec can't be run, as ``message`` says. The job ends, unless one of its attempts has ended.

        A job with an ended attempt waits instead, because its spec could be run before, and a person may undo the
        change.
        """
        if job.status.attempts.recent:
            return await self._refuse_for_now(job, message)
        end = JobEnd(succeeded=False, reason=Reason.BAD_INPUT, message=message)
        await self._writer.write(job, refused_input(job, invalid=message, end=end))
        return Requeue()

    async def _refuse_for_now(self, stored: StoredJob, message: str) -> Requeue:
        """Start nothing, write why, and reconcile again after a back-off.

        ``message`` says what is wrong. There are two cases. Either this version can't read the spec or the status, but
        another version of the operator may be able to. Or an attempt of the job has ended already and its spec can't be
        run any more, but a person may undo the change of the spec.
        """
        problem = RetryableError(Reason.BAD_INPUT, message)
        self._backoff.failed(stored.memory, problem)
        await self._writer.write(stored, refused_input(stored, invalid=message, problem=problem))
        return Requeue(pause=self._backoff.seconds_left(stored.memory))


def _parse_spec(stored: StoredJob) -> tuple[ParsedJob | None, str]:
    """Return the job with its parsed spec, and a text that says why the spec can't be run.

    The text is empty where the spec can be run. The job is None where this version can't read the spec, and the text
    then says which field can't be read.
    """
    try:
        job = parse_spec(stored)
    except ValidationError as error:
        return None, _first_problem(error)
    return job, "; ".join(str(error) for error in unrunnable(job.resource.spec))


def _first_problem(error: ValidationError) -> str:
    """Return path and problem of the first field that this version can't read, such as "spec.x: must be ..."."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _earliest(*seconds: float | None) -> float | None:
    """Return the least of ``seconds``; None where all are None."""
    return min((value for value in seconds if value is not None), default=None)
