"""Brings one FineTuneJob a step further: read the world, decide, at most one change of the attempt's objects, at
most one write of the status, and when to look again. Called by the workers of `controller`; a crash after any
write is harmless, because every step starts from what the API server holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.status import AttemptsStatus
from finetune_core.contract import ReportConfig, RunConfig, report_path
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from finetune_core.validation.runnable import unrunnable
from finetune_operator.act.annotations import CheckpointAnnotations
from finetune_operator.act.attempt_objects import AttemptObjects
from finetune_operator.act.preflight_objects import Preflights
from finetune_operator.decide.attempts import Next, Settlement, Step, World, advance, own_pods
from finetune_operator.decide.preflight import Check
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.observations import ChildObservation
from finetune_operator.observe.hints import HintReader
from finetune_operator.observe.observer import Observer
from finetune_operator.observe.record import Look, Record, parse_look, parse_record
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS, RetryableError
from finetune_operator.queue.work_queue import Key
from finetune_operator.settled import SettledJobs
from finetune_operator.status.compute import plan_of
from finetune_operator.status.conditions import View
from finetune_operator.status.recorder import Recorder
from finetune_operator.status.writer import StatusWriter

ACTIVE_LOOK_SECONDS = 60.0
"""An attempt is looked at this often though no event came: a lost event costs a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """When the queue looks at the job again."""

    after: float | None = None
    """Seconds; 0 for at once; None: an event or the resync will tell."""
    gone: bool = False
    """The job no longer exists."""


class Reconciler:
    """Reconciles one job at a time; holds no state but the memory of reports."""

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
        checkpoint_annotations: bool = True,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the world, and the time, from outside. ``ca_bundle`` returns the CA of the report server; ``preflight``
        (Run or Skip) is what jobs get that do not say it."""
        self._cluster = cluster
        self._memory = memory
        self._report_base_url = report_base_url
        self._observer = Observer(cluster, backend, memory)
        self._objects = AttemptObjects(
            cluster=cluster,
            backend=backend,
            trainer_image=trainer_image,
            report_base_url=report_base_url,
            ca_bundle=ca_bundle,
            clock=clock,
        )
        recorder = Recorder(cluster, instance=instance, now=now, clock=clock)
        self._writer = StatusWriter(
            cluster=cluster, recorder=recorder, metrics=metrics, child_kind=backend.kind, clock=clock
        )
        self._settled_jobs = SettledJobs(cluster, backend, self._writer)
        self._hints = HintReader(cluster, clock)
        self._preflights = Preflights(cluster, self._hints, self._objects, is_default=preflight == "Run", clock=clock)
        self._annotations = CheckpointAnnotations(cluster, enabled=checkpoint_annotations)
        self._metrics = metrics
        self._now = now

    async def reconcile(self, key: Key) -> Outcome:
        """Look at the job once; raises ApiError where the API server refuses or was faster."""
        raw = await self._cluster.get_job(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # Owner references clear its objects away, also while no operator runs.
            self._memory.forget(key)
            self._metrics.jobs.remove(key)
            return Outcome(gone=True)
        record = parse_record(key, raw, self._memory.job(key), self._now())
        set_log_fields(**record.log)
        record.memory.resource_version = raw["metadata"]["resourceVersion"]
        if record.settled:
            self._memory.set_reporting_attempt(key, None)
            self._metrics.jobs.update(key, record.stored)
            return Outcome(after=await self._settled_jobs.tidy(record))
        try:
            look = parse_look(record)
        except ValidationError as error:
            return await self._refuse_for_now(record, _first_problem(error))

        world = await self._observer.observe(look)
        step = advance(look.stored.attempts, world)
        try:
            config = self._resolve(look, step)
        except UserError as error:
            return await self._refuse(look, str(error))
        checking = await self._preflights.look(look, can_open=step.next is Next.OPEN) if _is_first(look) else None
        if checking is not None and checking.holds:
            return await self._check_first(look, world, checking, config)
        await self._read_hint(look, step, world)

        if _must_be_written_first(look, step):
            await self._writer.write(look, self._view(look, step, world, config, checking=checking))
            if step.next is Next.OPEN:
                self._objects.forgive(look.memory)
            return Outcome(after=0)
        child, problem = await self._act(look, step, world.child, config)
        view = self._view(look, step, world, config, child, problem, checking=checking)
        later = await self._writer.write(look, view)
        await self._annotations.tell(look, world.pods)
        return Outcome(after=_earliest(step.wait_seconds, later, self._next_look(look, step, child, problem)))

    # ---- decide ----

    def _resolve(self, look: Look, step: Step) -> RunConfig | None:
        """Return the run file of an attempt that is about to start; raises UserError where the spec can't be run."""
        if step.next not in (Next.OPEN, Next.CREATE):
            return None
        path = report_path(look.key.namespace, look.key.name, step.attempts.started)
        return resolve(look.job, report=ReportConfig(url=self._report_base_url + path))

    def _view(
        self,
        look: Look,
        step: Step,
        world: World,
        config: RunConfig | None,
        child: ChildObservation | None = None,
        problem: RetryableError | None = None,
        *,
        checking: Check | None = None,
    ) -> View:
        current = step.attempts.current
        resources = look.job.spec.resources
        return View(
            now=look.now,
            generation=look.job.metadata.generation,
            nodes=resources.nodes,
            ranks=resources.nodes * max(1, resources.gpus_per_node),
            attempts=step.attempts,
            child=(child or world.child) if current is not None or step.settled is not None else None,
            pods=own_pods(current, world) if current is not None else [],
            report=look.memory.report,
            reported_at=look.memory.reported_at,
            seconds_per_step=look.memory.speed.seconds_per_step(),
            problem=problem,
            # While an attempt runs, what can't be honoured is said and the attempt goes on.
            invalid="" if step.settled else "; ".join(str(error) for error in unrunnable(look.job.spec)),
            hint=look.memory.hint,
            settled=step.settled,
            image=self._objects.image(look),
            policy=look.job.spec.run_policy,
            ending_pods=len(world.pods) if current is None or world.held else 0,
            usage=world.usage,
            plan=plan_of(config) if config is not None else None,
            check=checking,
        )

    def _next_look(
        self, look: Look, step: Step, child: ChildObservation | None, problem: RetryableError | None
    ) -> float | None:
        """Return when to look though no event came."""
        if problem is not None:
            return self._objects.seconds_to_retry(look.memory)
        current = step.attempts.current
        if current is None:
            return None  # what is waited for has its own time, or a person will tell
        if look.condition_is(ConditionType.RUNNING, "True") or (child is not None and child.suspended):
            return ACTIVE_LOOK_SECONDS
        age = (look.now - current.start_time).total_seconds()
        return EVENTS_AFTER_SECONDS if age < EVENTS_AFTER_SECONDS else EVENTS_EVERY_SECONDS

    # ---- act ----

    async def _check_first(self, look: Look, world: World, checking: Check, config: RunConfig | None) -> Outcome:
        """Bring the check before attempt 1 a step further: the record first, then its objects."""
        soon = None
        if checking.record == look.stored.preflight and checking.settled is None:
            soon = await self._preflights.act(look, checking, config)
        step = Step(attempts=look.stored.attempts, next=Next.WATCH, settled=checking.settled)
        later = await self._writer.write(look, self._view(look, step, world, config, checking=checking))
        return Outcome(after=_earliest(soon, later, checking.wait_seconds))

    async def _act(
        self, look: Look, step: Step, child: ChildObservation | None, config: RunConfig | None
    ) -> tuple[ChildObservation | None, RetryableError | None]:
        """Create or delete the attempt's objects; return the child as it is then, or what stood in the way."""
        if step.next is Next.REMOVE and child is not None:
            await self._objects.remove(look, child)
            return None, None
        if step.next is Next.CREATE and config is not None:
            try:
                return await self._objects.create(look, config), None
            except RetryableError as problem:
                return None, problem
        return child, None

    async def _read_hint(self, look: Look, step: Step, world: World) -> None:
        """Ask for the warnings about what the attempt waits for; one that runs waits for nothing."""
        if look.condition_is(ConditionType.RUNNING, "True"):
            look.memory.hint = ""
        else:
            await self._hints.read(look.memory, look.key.namespace, step.attempts.current, world)

    # ---- refuse ----

    async def _refuse(self, look: Look, message: str) -> Outcome:
        """The spec can't be run. One that has run can be changed back; one that hasn't never will: it ends here."""
        if look.stored.attempts.recent:
            return await self._refuse_for_now(look, message)
        settled = Settlement(succeeded=False, reason=Reason.BAD_INPUT, message=message)
        await self._writer.write(look, _bare_view(look, invalid=message, settled=settled))
        return Outcome()

    async def _refuse_for_now(self, record: Record, message: str) -> Outcome:
        """Start nothing, say why, and look again later: another version's CRD let the job in, or a field changed."""
        problem = RetryableError(Reason.BAD_INPUT, message)
        self._objects.postpone(record.memory, problem)
        await self._writer.write(record, _bare_view(record, invalid=message, problem=problem))
        return Outcome(after=self._objects.seconds_to_retry(record.memory))


def _is_first(look: Look) -> bool:
    """Tell whether no attempt was opened yet."""
    return not look.stored.attempts.started


def _must_be_written_first(look: Look, step: Step) -> bool:
    """Tell whether the bookkeeping changed: then it is written, and the attempt's objects are touched afterwards."""
    return step.settled is not None or _accounting(step.attempts) != _accounting(look.stored.attempts)


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


def _first_problem(error: ValidationError) -> str:
    """Return the first field that another version's CRD let in, and what it must be."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _bare_view(
    record: Record, *, invalid: str, settled: Settlement | None = None, problem: RetryableError | None = None
) -> View:
    """Return the view of a job of which nothing but its record is known."""
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


def _earliest(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return min(known) if known else None
