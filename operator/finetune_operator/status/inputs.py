"""What a status is computed from, beside the stored one: the decision of this reconcile, what was read, and reports.

`reconcile.py` makes a `StatusInput` in each reconcile; `compute.py` and `conditions.py` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptsStatus, PlanStatus, PreflightStatus, UsageStatus
from finetune_core.contract import Report, RunConfig
from finetune_core.validation.runnable import unrunnable
from finetune_operator.decide.decision import Decision, JobEnd
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.observation import JobObservation
from finetune_operator.observe.stored_job import ParsedJob, StoredJob
from finetune_operator.queue.retryable import RetryableError


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusInput:
    """Everything that a status is computed from, beside the stored one."""

    now: datetime
    generation: int
    """`metadata.generation` of the job, which becomes `observedGeneration`."""
    nodes: int
    """Pods of an attempt."""
    ranks: int
    """Training processes over all pods of an attempt."""
    policy: RunPolicySpec = field(default_factory=RunPolicySpec)
    image: str | None = None
    """Image that the job's pods run."""
    plan: PlanStatus | None = None
    """What the spec of an attempt that is about to start was resolved to; None in any other reconcile."""
    invalid: str = ""
    """Why the spec can't be run, with the field's path; empty where it can."""
    attempts: AttemptsStatus
    preflight: PreflightStatus | None = None
    end: JobEnd | None = None
    """How the job ends; None while it goes on."""
    is_checked: bool = False
    """Whether the preflight check is what attempt 1 waits for, or what ended the job."""
    missing: str = ""
    """What the preflight check found missing outside the spec; empty where nothing is known."""
    child: ChildObservation | None = None
    """Child of the current attempt, or of the last one of a job that ends; None between attempts."""
    pods: Sequence[PodObservation] = ()
    """Pods of the current attempt; none between attempts."""
    ending_pods: int = 0
    """Pods of ended attempts, or of an admission that a queue took back, that still terminate."""
    usage: UsageStatus | None = None
    problem: RetryableError | None = None
    """Why the API server refused to create the attempt's objects; None where it did not."""
    warning: str = ""
    """Newest warning event about a pod that does not start."""
    report: Report | None = None
    """Newest report of the current attempt, or the last report of the attempt that just ended."""
    reported_at: datetime | None = None
    seconds_per_step: float | None = None
    """Duration of an optimizer step as the operator measured it over all attempts; None before two steps."""

    @property
    def held(self) -> bool:
        """Whether the child of the current attempt is suspended."""
        return self.child is not None and self.child.suspended


def status_input(
    job: ParsedJob,
    seen: JobObservation,
    decision: Decision,
    *,
    image: str,
    config: RunConfig | None,
    created: ChildObservation | None = None,
    problem: RetryableError | None = None,
) -> StatusInput:
    """Return the input for a job whose reconcile has read ``seen`` and decided ``decision``.

    ``created`` is the child that this reconcile created; ``problem`` says why it could not create one.
    """
    resources = job.resource.spec.resources
    current = decision.attempts.current
    return StatusInput(
        now=job.now,
        generation=job.resource.metadata.generation,
        nodes=resources.nodes,
        ranks=resources.processes,
        policy=job.resource.spec.run_policy,
        image=image,
        plan=plan_of(config) if config is not None else None,
        # What this version can't run keeps a new attempt from starting. An attempt that runs goes on.
        invalid="" if decision.end else "; ".join(str(error) for error in unrunnable(job.resource.spec)),
        attempts=decision.attempts,
        preflight=decision.preflight,
        end=decision.end,
        is_checked=decision.is_checked,
        missing=decision.missing,
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
    """Return the input for a job whose spec this version can't read or run; attempts and check stay as they are."""
    return StatusInput(
        now=job.now,
        generation=job.manifest["metadata"].get("generation", 0),
        nodes=1,
        ranks=1,
        invalid=invalid,
        attempts=job.status.attempts,
        preflight=job.status.preflight,
        end=end,
        problem=problem,
    )


def _shown_child(seen: JobObservation, decision: Decision, created: ChildObservation | None) -> ChildObservation | None:
    """Return the child that the status names: the current attempt's, or the last one's where the job ends."""
    if decision.attempts.current is None and decision.end is None:
        return None
    return created or seen.child


def _ending_pods(seen: JobObservation, decision: Decision) -> int:
    """Return how many pods terminate, while no attempt is current or a queue has taken the admission back."""
    return len(seen.pods) if decision.attempts.current is None or seen.held else 0


def plan_of(config: RunConfig) -> PlanStatus:
    """Return `status.plan`: what the spec of an attempt was resolved to."""
    batch, micro = config.optimization.global_batch_size, config.optimization.micro_batch_size
    return PlanStatus(
        zero_stage=config.optimization.zero_stage,
        processes=config.world.size,
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-batch // (config.world.size * micro)),
    )
