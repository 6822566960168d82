"""Brings one FineTuneJob a step further: read the world, decide, at most one change of the attempt's objects, at
most one write of the status, and when to look again. Called by the workers of `controller`; a crash after any
write is harmless, because every step starts from what the API server holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_core.api import FineTuneJob, FineTuneJobStatus
from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.status import AttemptsStatus
from finetune_core.contract import ReportConfig, RunConfig, report_path
from finetune_core.errors import UserError
from finetune_core.names import attempt_name
from finetune_core.resolve import resolve
from finetune_core.validation.runnable import unrunnable
from finetune_operator.attempts import Next, Settlement, Step, World, advance
from finetune_operator.backend import Backend
from finetune_operator.cluster import Cluster
from finetune_operator.conditions import View
from finetune_operator.hints import HintReader
from finetune_operator.keyqueue import Key, backoff_seconds
from finetune_operator.labels import JOB_UID
from finetune_operator.memory import JobMemory, Memory, ReportingAttempt
from finetune_operator.metrics import Metrics
from finetune_operator.observed import ChildObservation, PodObservation, parse_pod
from finetune_operator.pods import AttemptPlan
from finetune_operator.problems import (
    EVENTS_AFTER_SECONDS,
    EVENTS_EVERY_SECONDS,
    FIRST_RETRY_SECONDS,
    OutsideError,
)
from finetune_operator.recorder import Recorder
from finetune_operator.run_file import build_config_map, create_config_map
from finetune_operator.status import LEAST_SECONDS_BETWEEN_NUMBERS, compute_status, is_transition

logger = logging.getLogger(__name__)

ACTIVE_LOOK_SECONDS = 60.0
"""An attempt is looked at this often though no event came: a lost event costs a minute."""
SIDECAR_SECONDS = 60.0
"""Pods that still run this long after their job was settled go with the child."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """When the queue looks at the job again."""

    after: float | None = None
    """Seconds; 0 for at once; None: an event or the resync will tell."""
    gone: bool = False
    """The job no longer exists."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A stored job whose spec need not be readable."""

    key: Key
    raw: dict[str, Any]
    stored: FineTuneJobStatus
    now: datetime
    memory: JobMemory

    @property
    def uid(self) -> str:
        """The job's uid."""
        return str(self.raw["metadata"]["uid"])

    @property
    def log(self) -> dict[str, object]:
        """Fields of log lines about this job."""
        return {"job": str(self.key), "uid": self.uid, "attempt": self.stored.attempts.started}


@dataclass(frozen=True, kw_only=True)
class _Look(_Record):
    """What one look at a job has in hand."""

    job: FineTuneJob


class Reconciler:
    """Reconciles one job at a time; holds no state but the memory of reports."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        backend: Backend,
        memory: Memory,
        metrics: Metrics,
        trainer_image: str,
        report_base_url: str,
        ca_bundle: Callable[[], str],
        instance: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the world, and the time, from outside. ``ca_bundle`` returns the CA of the report server."""
        self._cluster = cluster
        self._backend = backend
        self._memory = memory
        self._metrics = metrics
        self._trainer_image = trainer_image
        self._report_base_url = report_base_url
        self._ca_bundle = ca_bundle
        self._recorder = Recorder(cluster, instance=instance, now=now)
        self._hints = HintReader(cluster, clock)
        self._now = now
        self._clock = clock

    async def reconcile(self, key: Key) -> Outcome:
        """Look at the job once; raises ApiError where the API server refuses or was faster."""
        raw = await self._cluster.get_job(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # Owner references clear its objects away, also while no operator runs.
            self._memory.forget(key)
            return Outcome(gone=True)
        record = self._record(key, raw)
        if _is_settled(record.stored):
            return await self._tidy(record)
        try:
            look = _Look(job=_parse_job(raw), **vars(record))
        except ValidationError as error:
            return await self._refuse_unreadable(record, error)

        child, pods = await self._observe(look)
        world = self._world(look, child, pods)
        step = advance(look.stored.attempts, world)
        config: RunConfig | None = None
        if step.next in (Next.OPEN, Next.CREATE):
            try:
                config = self._resolve(look, step.attempts.started)
            except UserError as error:
                if look.stored.attempts.recent:
                    # It has run: only a field that may change has changed, and it may change back.
                    return await self._refuse_for_now(look, str(error))
                return await self._settle_invalid(look, str(error))
        if _condition_is(look.stored, ConditionType.RUNNING, "True"):
            look.memory.hint = ""
        else:
            await self._hints.read(look.memory, look.key.namespace, step.attempts.current, world)

        problem: OutsideError | None = None
        accounted = _accounting(step.attempts) == _accounting(look.stored.attempts)
        if accounted and step.settled is None:
            child, problem = await self._act(look, step, child, config)
        view = self._view(look, step, child, world, problem)
        later = await self._write_status(look, view)
        if not accounted and step.settled is None:
            return Outcome(after=0)
        return Outcome(after=_earliest(step.wait_seconds, later, self._next_look(look, step, problem)))

    # ---- read ----

    def _record(self, key: Key, raw: dict[str, Any]) -> _Record:
        """Parse the status. Fields that another version of the operator wrote are passed over."""
        status = raw.get("status")
        return _Record(
            key=key,
            raw=raw,
            stored=FineTuneJobStatus.model_validate(status, extra="ignore") if status else FineTuneJobStatus(),
            now=self._now().replace(microsecond=0),
            memory=self._memory.of(key),
        )

    async def _observe(self, look: _Look) -> tuple[ChildObservation | None, list[PodObservation]]:
        """Return the child of the newest attempt and the pods of all attempts."""
        metadata, started = look.job.metadata, look.stored.attempts.started
        if not started:
            self._memory.expect(look.key, None)
            return None, []
        name = attempt_name(metadata.name, metadata.uid, started)
        child = await self._backend.observe(metadata.namespace, name)
        if child is not None and child.owner_uid != metadata.uid:
            child = None  # somebody else's; creating ours will say so
        manifests = await self._cluster.list_pods(metadata.namespace, f"{JOB_UID}={metadata.uid}")
        pods = [pod for manifest in manifests if (pod := parse_pod(manifest)) is not None]
        self._expect_reports(look, pods)
        return child, pods

    def _expect_reports(self, look: _Look, pods: list[PodObservation]) -> None:
        """Tell the report server whose reports count."""
        current = look.stored.attempts.current
        if current is None:
            self._memory.expect(look.key, None)
            return
        uids = frozenset(pod.uid for pod in pods if pod.attempt == current.number)
        reporting = ReportingAttempt(uid=look.job.metadata.uid, attempt=current.number, pod_uids=uids)
        self._memory.expect(look.key, reporting)

    def _world(self, look: _Look, child: ChildObservation | None, pods: list[PodObservation]) -> World:
        report = look.memory.report
        recorded = look.stored.child
        return World(
            now=look.now,
            nodes=look.job.spec.resources.nodes,
            max_retries=look.job.spec.run_policy.max_retries,
            child=child,
            child_uid=recorded.uid if recorded and look.stored.attempts.current else "",
            pods=pods,
            checkpoints=look.stored.checkpoints,
            final_result=report.result if report else None,
        )

    # ---- decide ----

    def _resolve(self, look: _Look, attempt: int) -> RunConfig:
        """Return the run file; raises UserError where the spec can't be run."""
        path = report_path(look.key.namespace, look.key.name, attempt)
        return resolve(look.job, report=ReportConfig(url=self._report_base_url + path))

    def _view(
        self,
        look: _Look,
        step: Step,
        child: ChildObservation | None,
        world: World,
        problem: OutsideError | None,
    ) -> View:
        current = step.attempts.current
        resources = look.job.spec.resources
        return View(
            now=look.now,
            generation=look.job.metadata.generation,
            nodes=resources.nodes,
            ranks=resources.nodes * max(1, resources.gpus_per_node),
            attempts=step.attempts,
            child=child if current is not None else None,
            pods=[pod for pod in world.pods if current is not None and pod.attempt == current.number],
            report=look.memory.report,
            reported_at=look.memory.reported_at,
            problem=problem,
            # While an attempt runs, what can't be honoured is said and the attempt goes on.
            invalid="" if step.settled else "; ".join(str(error) for error in unrunnable(look.job.spec)),
            hint=look.memory.hint,
            settled=step.settled,
            image=look.job.spec.pod_template.image or self._trainer_image,
        )

    def _next_look(self, look: _Look, step: Step, problem: OutsideError | None) -> float | None:
        if problem is not None:
            return max(0.0, look.memory.retry_at - self._clock())
        if step.settled is not None:
            return SIDECAR_SECONDS
        if _condition_is(look.stored, ConditionType.RUNNING, "True"):
            return ACTIVE_LOOK_SECONDS
        current = step.attempts.current
        age = (look.now - current.start_time).total_seconds() if current else 0.0
        return EVENTS_AFTER_SECONDS if age < EVENTS_AFTER_SECONDS else EVENTS_EVERY_SECONDS

    # ---- act ----

    async def _act(
        self, look: _Look, step: Step, child: ChildObservation | None, config: RunConfig | None
    ) -> tuple[ChildObservation | None, OutsideError | None]:
        """Create or delete the attempt's objects; return the child as it is then, or what stood in the way."""
        if step.next is Next.REMOVE and child is not None:
            await self._cluster.delete_config_map(look.key.namespace, child.name)
            await self._backend.delete(look.key.namespace, child)
            logger.info("attempt removed", extra=look.log)
            return None, None
        if step.next is not Next.CREATE or config is None:
            return child, None
        memory = look.memory
        if memory.problem is not None and self._clock() < memory.retry_at:
            return None, memory.problem
        try:
            created = await self._create(look, config)
        except OutsideError as problem:
            self._postpone(memory, problem)
            logger.warning("attempt not created: %s", problem.message, extra=look.log)
            return None, problem
        memory.problem, memory.failures = None, 0
        logger.info("attempt created", extra=look.log)
        return created, None

    def _postpone(self, memory: JobMemory, problem: OutsideError) -> None:
        memory.failures += 1
        memory.problem = problem
        memory.retry_at = self._clock() + backoff_seconds(memory.failures, jitter=0, least=FIRST_RETRY_SECONDS)

    async def _create(self, look: _Look, config: RunConfig) -> ChildObservation:
        """Create ConfigMap, then child, under names that a second try finds again."""
        metadata, number = look.job.metadata, look.stored.attempts.started
        image = look.stored.image or look.job.spec.pod_template.image or self._trainer_image
        plan = AttemptPlan(number=number, name=attempt_name(metadata.name, metadata.uid, number), image=image)
        await create_config_map(self._cluster, build_config_map(look.job, plan, config, self._ca_bundle()))
        return await self._backend.create(self._backend.build(look.job, plan))

    # ---- write ----

    async def _write_status(self, record: _Record, view: View) -> float | None:
        """Apply the status if it differs; new numbers wait until ten seconds have passed since the last write.

        Returns in how many seconds it is to be written where it waits.
        """
        status = compute_status(record.stored, view, child_kind=self._backend.kind)
        old = record.stored if record.raw.get("status") else None
        if status == old:
            return None
        written_at = record.memory.status_written_at
        if written_at is not None and not is_transition(old, status):
            left = written_at + LEAST_SECONDS_BETWEEN_NUMBERS - self._clock()
            if left > 0:
                return left
        await self._cluster.apply_status(record.key, record.raw["metadata"]["resourceVersion"], status.to_json())
        record.memory.status_written_at = self._clock()
        self._metrics.status_writes.inc()
        await self._recorder.tell(record.key, record.uid, record.stored, status, record.log)
        return None

    async def _settle_invalid(self, look: _Look, message: str) -> Outcome:
        """The spec can't be run, whatever is tried: say so once and for all."""
        settled = Settlement(succeeded=False, reason=Reason.BAD_INPUT, message=message)
        view = self._bare_view(look, invalid=message, settled=settled)
        await self._write_status(look, view)
        return Outcome()

    async def _refuse_unreadable(self, record: _Record, error: ValidationError) -> Outcome:
        """A job that another version's CRD let in: not final, since another version of the operator may read it."""
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        return await self._refuse_for_now(record, message)

    async def _refuse_for_now(self, record: _Record, message: str) -> Outcome:
        """Start nothing, say why, and look again later."""
        self._postpone(record.memory, OutsideError(Reason.BAD_INPUT, message))
        await self._write_status(record, self._bare_view(record, invalid=message, problem=record.memory.problem))
        return Outcome(after=max(0.0, record.memory.retry_at - self._clock()))

    def _bare_view(
        self,
        record: _Record,
        *,
        invalid: str,
        settled: Settlement | None = None,
        problem: OutsideError | None = None,
    ) -> View:
        return View(
            now=record.now,
            generation=record.raw["metadata"].get("generation", 0),
            nodes=1,
            ranks=1,
            attempts=record.stored.attempts,
            invalid=invalid,
            settled=settled,
            problem=problem,
        )

    async def _tidy(self, record: _Record) -> Outcome:
        """A settled job creates nothing again; what still runs after a minute goes with its child."""
        self._memory.expect(record.key, None)
        if record.stored.child is None or record.stored.completion_time is None:
            return Outcome()
        child = await self._backend.observe(record.key.namespace, record.stored.child.name)
        if child is None or child.finished or child.deleting or child.owner_uid != record.uid:
            return Outcome()
        left = SIDECAR_SECONDS - (record.now - record.stored.completion_time).total_seconds()
        if left > 0:
            return Outcome(after=left)
        await self._backend.delete(record.key.namespace, child)
        logger.info("pods that outlived the job were removed", extra=record.log)
        return Outcome()


def _parse_job(raw: dict[str, Any]) -> FineTuneJob:
    """Return the job without its status; raises ValidationError where the spec is none of this version."""
    return FineTuneJob.model_validate({name: raw[name] for name in ("apiVersion", "kind", "metadata", "spec")})


def _accounting(attempts: AttemptsStatus) -> tuple[object, ...]:
    """Return what must be written before any object is touched: numbers, counts and causes of attempts."""
    current = attempts.current
    return (
        attempts.started,
        attempts.charged,
        attempts.free,
        current.number if current else None,
        current.cause if current else None,
    )


def _is_settled(status: FineTuneJobStatus) -> bool:
    """Whether the job has ended: True or False of `Succeeded` is final."""
    return any(
        condition.type == ConditionType.SUCCEEDED and condition.status != "Unknown" for condition in status.conditions
    )


def _condition_is(status: FineTuneJobStatus, kind: ConditionType, value: str) -> bool:
    return any(condition.type == kind and condition.status == value for condition in status.conditions)


def _earliest(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return min(known) if known else None
