"""The inputs from which a job's new status is computed, besides the status stored in the API server.

These inputs are the decision of this reconcile, the objects that were read from the cluster, and the newest report.

For a job that has not ended, `reconcile.py` makes a `StatusInput` in each reconcile. `compute.py` and `conditions.py`
compute the status from the `StatusInput`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.api.evaluation import RequirementSpec
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import (
    AdapterStatus,
    AttemptsStatus,
    PlanStatus,
    PreflightStatus,
    TrainingChoices,
    UsageStatus,
)
from finetune_core.contract import Report, RunConfig
from finetune_core.contract.preflight_result import PlannedNeeds
from finetune_operator.decide.decision import Decision, JobEnd
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.observation import JobObservation
from finetune_operator.observe.stored_job import StoredJob
from finetune_operator.queue.retryable import RetryableError


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusInput:
    """Everything from which a job's new status is computed, besides the stored status."""

    now: datetime
    generation: int
    """`metadata.generation` of the job, which becomes `observedGeneration`."""
    nodes: int
    """Number of pods of an attempt."""
    ranks: int
    """Number of training processes of an attempt, over all its pods."""
    policy: RunPolicySpec = field(default_factory=RunPolicySpec)
    requirements: Sequence[RequirementSpec] = ()
    """The scores of `evaluation.require`."""
    image: str | None = None
    """Image that the job's pods are to run."""
    plan: PlanStatus | None = None
    """`status.plan` of an attempt that is about to start, or whose preflight check is not over; None otherwise."""
    invalid: str = ""
    """Why the spec can't be run, or why this version can't read the spec or the status, with the path of the field.
    Empty where nothing is wrong, and where the job ends for another reason."""
    observed: bool = True
    """Whether `child` and `pods` hold what this reconcile has read. If not, the conditions `Scheduled` and `Running`
    keep their stored values, unless the job ends."""
    attempts: AttemptsStatus
    preflight: PreflightStatus | None = None
    adapter: AdapterStatus | None = None
    """The artifact that the job starts from, where this reconcile has found it; else None."""
    end: JobEnd | None = None
    """How the job ends; None while it goes on."""
    is_checked: bool = False
    """Whether attempt 1 waits for the preflight check, or the job fails because of that check."""
    missing: str = ""
    """Why the preflight check has not passed yet, as in `Decision.missing`; empty where no reason is known."""
    turn: str = ""
    """A sentence which says that the preflight check waits for its turn; empty where the check does not wait for it."""
    child: ChildObservation | None = None
    """Child object of the current attempt or, where the job ends, of its last attempt. None between two attempts, and
    where no child exists."""
    pods: Sequence[PodObservation] = ()
    """Pods of the current attempt; empty between two attempts."""
    ending_pods: int = 0
    """Number of pods that still terminate after their attempt ended, or after their child was suspended."""
    usage: UsageStatus | None = None
    problem: RetryableError | None = None
    """Why the attempt's objects could not be created, or why the spec or status can't be used at the moment; else
    None."""
    warning: str = ""
    """Newest warning event about a pod that does not start, or about a child object without pods; else empty."""
    report: Report | None = None
    """Newest report of the current attempt, or the last report of the attempt that just ended."""
    reported_at: datetime | None = None
    seconds_per_step: float | None = None
    """Recent training speed as the operator measured it (`queue/speed.py`); None where it is not known yet."""

    @property
    def held(self) -> bool:
        """Whether the child of the current attempt is suspended."""
        return self.child is not None and self.child.suspended


def status_input(
    job: StoredJob,
    seen: JobObservation,
    decision: Decision,
    *,
    image: str | None,
    invalid: str,
    config: RunConfig | None,
    created: ChildObservation | None = None,
    problem: RetryableError | None = None,
) -> StatusInput:
    """Return the inputs for the status of a job whose reconcile has read ``seen`` and decided ``decision``.

    ``image`` is the image of the job's pods. ``invalid`` says why this version can't read or run the spec. Such a spec
    keeps a new attempt from starting, but an attempt that runs already goes on. ``config`` is the run file; None where
    no pod is about to start. ``created`` is the child object that this reconcile created or found, and ``problem`` says
    why this reconcile could not create the objects of the attempt.
    """
    current = decision.attempts.current
    return StatusInput(
        now=job.now,
        generation=job.generation,
        nodes=job.resources.nodes,
        ranks=job.resources.processes,
        policy=job.policy,
        requirements=job.requirements,
        image=image,
        plan=plan_of(config, decision.planned, fixes=_fixes(decision)) if config is not None else None,
        invalid="" if decision.end else invalid,
        attempts=decision.attempts,
        preflight=decision.preflight,
        adapter=decision.adapter,
        end=decision.end,
        is_checked=decision.is_checked,
        missing=decision.missing,
        turn=decision.turn,
        child=_shown_child(seen, decision, created),
        pods=seen.pods_of(current) if current is not None else [],
        ending_pods=_ending_pods(seen, decision),
        usage=seen.usage,
        problem=problem,
        warning=seen.warning if current is None or current.cause is None else "",
        report=job.memory.report,
        reported_at=job.memory.reported_at,
        seconds_per_step=job.memory.speed.seconds_per_step(),
    )


def refused_input(
    job: StoredJob, *, invalid: str, end: JobEnd | None = None, problem: RetryableError | None = None
) -> StatusInput:
    """Return the inputs for the status of a job whose spec or status this version can't use.

    The attempts and the preflight check in the status stay as they are. ``invalid`` says what is wrong with the spec or
    status. ``end`` is how the job ends for this reason; None where the job waits. ``problem`` is why the job waits;
    None where the job ends.
    """
    return StatusInput(
        now=job.now,
        generation=job.generation,
        nodes=job.resources.nodes,
        ranks=job.resources.processes,
        invalid=invalid,
        observed=False,
        attempts=job.status.attempts,
        preflight=job.status.preflight,
        end=end,
        problem=problem,
    )


def _shown_child(seen: JobObservation, decision: Decision, created: ChildObservation | None) -> ChildObservation | None:
    """Return the child object that `status.child` names: the current attempt's child or, if the job ends, the last."""
    if decision.attempts.current is None and decision.end is None:
        return None
    return created or seen.child


def _ending_pods(seen: JobObservation, decision: Decision) -> int:
    """Return how many pods still exist where no attempt is current or the child is suspended; else 0."""
    return len(seen.pods) if decision.attempts.current is None or seen.held else 0


def choices_of(stored: PlanStatus | None, planned: PlannedNeeds | None) -> TrainingChoices | None:
    """Return the settings of all attempts: those that ``stored``, the plan in the status, has, or else those that the
    preflight check has just told in ``planned``. None where they are not fixed."""
    if stored is not None and stored.choices is not None:
        return stored.choices
    if planned is None or planned.choices is None:
        return None
    return TrainingChoices.model_validate(planned.choices.model_dump())


def _fixes(decision: Decision) -> bool:
    """Return whether the settings of the training are fixed with ``decision``: once the preflight check has told its
    plan, or else with the first attempt. A halved micro-batch is no choice."""
    told = decision.planned is not None and decision.planned.choices is not None
    return (told or decision.attempts.started > 0) and not decision.attempts.memory_halvings


def plan_of(config: RunConfig, planned: PlannedNeeds | None = None, *, fixes: bool = False) -> PlanStatus:
    """Return `status.plan` for the run file ``config``: the ZeRO stage, the number of processes, the size of a
    micro-batch, and the number of micro-batches of one process per optimizer step. ``planned`` is what such a training
    needs, where the preflight check has just told it. ``fixes`` says whether all later attempts have the settings of
    ``config``."""
    optimization = config.optimization
    batch, micro = config.optimization.global_batch_size, config.optimization.micro_batch_size
    return PlanStatus(
        zero_stage=config.optimization.zero_stage,
        processes=config.world.size,
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-batch // (config.world.size * micro)),
        gpu_memory_bytes=planned.gpu_memory_bytes if planned is not None else None,
        memory_bytes=planned.memory_bytes if planned is not None else None,
        cpus=planned.cpus if planned is not None else None,
        advice=planned.advice if planned is not None else "",
        choices=TrainingChoices(
            zero_stage=optimization.zero_stage,
            offload_optimizer=optimization.offload_optimizer,
            gradient_checkpointing=optimization.gradient_checkpointing,
            micro_batch_size=micro,
        )
        if fixes
        else None,
    )
