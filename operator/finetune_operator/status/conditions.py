"""Computes the conditions of a FineTuneJob from what was observed. Pure; called by `status`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.api.conditions import Condition, ConditionType, Reason
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import AttemptsStatus, FineTuneJobStatus, PastAttempt, PlanStatus, UsageStatus
from finetune_core.contract import Report
from finetune_operator import messages
from finetune_operator.decide.attempts import Settlement
from finetune_operator.decide.preflight import Check
from finetune_operator.decide.verdict import Verdict
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.waiting import attempt_detail
from finetune_operator.queue.retryable import RetryableError

MESSAGE_LIMIT = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Everything that a status is computed from, beside the stored one."""

    now: datetime
    generation: int
    nodes: int
    ranks: int
    """Training processes over all pods."""
    attempts: AttemptsStatus
    child: ChildObservation | None = None
    """Object of the current attempt."""
    pods: Sequence[PodObservation] = field(default=())
    """Pods of the current attempt."""
    report: Report | None = None
    """Newest report of the current attempt, or the last one of the attempt that just ended."""
    reported_at: datetime | None = None
    seconds_per_step: float | None = None
    """Speed that the operator observed, over all attempts."""
    problem: RetryableError | None = None
    invalid: str = ""
    """What makes the spec impossible, with the field's path."""
    hint: str = ""
    """Newest warning event about a pod that waits."""
    settled: Settlement | None = None
    image: str | None = None
    policy: RunPolicySpec = field(default_factory=RunPolicySpec)
    ending_pods: int = 0
    """Pods of ended attempts, or of an admission that was taken back, that are not gone yet."""
    usage: UsageStatus | None = None
    plan: PlanStatus | None = None
    """What the attempt that is about to start was resolved to."""
    check: Check | None = None
    """The check before attempt 1; None after it, and where nothing is known of it."""


@dataclass(frozen=True, slots=True)
class _State:
    """A condition without its type and times."""

    status: str
    reason: str
    message: str = ""


def compute_conditions(stored: FineTuneJobStatus, status: FineTuneJobStatus, view: View) -> list[Condition]:
    """Return all known conditions; ``status`` holds what was merged from reports already.

    `lastTransitionTime` is kept where a condition's status did not change.
    """
    old = {condition.type: condition for condition in stored.conditions}
    running = _running(view, old.get(ConditionType.RUNNING))
    succeeded = _succeeded(view, is_running=running.status == "True")
    states = {
        ConditionType.READY: _ready(view, succeeded),
        ConditionType.RECONCILING: _reconciling(view, succeeded),
        ConditionType.STALLED: _stalled(view),
        ConditionType.ACCEPTED: _accepted(view),
        ConditionType.SCHEDULED: _scheduled(view),
        ConditionType.RUNNING: running,
        ConditionType.CHECKPOINT_AVAILABLE: _checkpoint_available(status, view),
        ConditionType.SUCCEEDED: succeeded,
    }
    return [_condition(kind, state, old.get(kind), view) for kind, state in states.items()]


def _condition(kind: ConditionType, state: _State, old: Condition | None, view: View) -> Condition:
    unchanged = old is not None and old.status == state.status
    return Condition.model_validate(
        {
            "type": kind.value,
            "status": state.status,
            "observedGeneration": view.generation,
            "lastTransitionTime": old.last_transition_time if unchanged and old else view.now,
            "reason": str(state.reason),
            "message": state.message[:MESSAGE_LIMIT],
        }
    )


def _succeeded(view: View, *, is_running: bool) -> _State:
    """Return the summary; its reason is the State column of `kubectl get`."""
    if view.settled is not None:
        return _State("True" if view.settled.succeeded else "False", view.settled.reason, view.settled.message)
    if view.problem is not None:
        return _State("Unknown", view.problem.reason, view.problem.message)
    if view.check is not None and view.check.is_wanted:
        return _State("Unknown", Reason.PREFLIGHT, view.check.cause or messages.PREFLIGHT_RUNS)
    attempts = view.attempts
    current = attempts.current
    last = attempts.recent[-1] if attempts.recent else None
    if current is None:
        return _between_attempts(view, last)
    if _is_held(view):
        return _held(view)
    if current.cause is not None and current.cause.verdict != Verdict.SUCCEEDED:
        return _State("Unknown", Reason.RETRYING, messages.retrying(current.number, current.cause.message, None))
    if is_running:
        return _State("Unknown", Reason.RUNNING, messages.running(view.nodes, current.number))
    detail = waiting_detail(view)
    prefix = messages.attempt_prefix(current.number, last.message if last else "")
    message = "; ".join(part for part in (prefix, detail) if part)
    return _State("Unknown", Reason.STARTING if view.pods else Reason.QUEUED, message)


def _between_attempts(view: View, last: PastAttempt | None) -> _State:
    """Return what is waited for while no attempt exists."""
    if last is not None and last.verdict == Verdict.PERMANENT:
        return _State("Unknown", last.reason, messages.pods_end(last.message, view.ending_pods))
    if view.policy.cancel:
        return _State("Unknown", Reason.CANCELLED, messages.pods_end(messages.CANCELLED, view.ending_pods))
    if view.policy.suspend:
        message = messages.pods_end(messages.SUSPENDED, view.ending_pods)
        return _State("Unknown", Reason.SUSPENDED, message if view.ending_pods else messages.SUSPENDED_REST)
    if last is None:
        return _State("Unknown", Reason.QUEUED, messages.NO_PODS)
    message = messages.retrying(last.number, last.message, view.attempts.next_start_time)
    return _State("Unknown", Reason.RETRYING, message)


def _is_held(view: View) -> bool:
    return view.child is not None and view.child.suspended


def _held(view: View) -> _State:
    """Return who holds an attempt whose child is suspended."""
    if queue := view.policy.queue_name:
        return _State("Unknown", Reason.QUEUED, messages.pods_end(messages.queued(queue), view.ending_pods))
    return _State("Unknown", Reason.SUSPENDED, messages.SUSPENDED_ELSEWHERE)


def _ready(view: View, succeeded: _State) -> _State:
    return _State("True" if view.settled and view.settled.succeeded else "False", succeeded.reason, succeeded.message)


def _reconciling(view: View, succeeded: _State) -> _State:
    if view.settled is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    return _State("True", Reason.IN_PROGRESS, succeeded.message)


def _stalled(view: View) -> _State:
    if view.settled is not None and not view.settled.succeeded:
        return _State("True", view.settled.reason, view.settled.message)
    if view.settled is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    return _State("False", Reason.IN_PROGRESS)


def _accepted(view: View) -> _State:
    if view.invalid:
        return _State("False", Reason.BAD_INPUT, view.invalid)
    if view.problem is not None:
        return _State("False", view.problem.reason, view.problem.message)
    if view.check is not None and view.check.is_wanted:
        return _checked(view.check)
    return _State("True", Reason.VALID, messages.VALID)


def _checked(check: Check) -> _State:
    """Return what is known of what the job needs, before attempt 1."""
    if check.settled is not None and check.settled.reason == Reason.BAD_INPUT:
        return _State("False", Reason.BAD_INPUT, check.settled.message)
    if cause := check.settled.message if check.settled is not None else check.cause:
        return _State("False", Reason.OUTSIDE_FAILURE, cause)
    return _State("Unknown", Reason.PREFLIGHT, messages.PREFLIGHT_RUNS)


def _scheduled(view: View) -> _State:
    if view.settled is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    if view.attempts.current is None or _is_held(view):
        return _State("False", Reason.WAITING_FOR_PODS, messages.BETWEEN_ATTEMPTS)
    placed = [pod for pod in view.pods if pod.node]
    if len(placed) >= view.nodes:
        return _State("True", Reason.SCHEDULED, messages.SCHEDULED)
    return _State("False", Reason.WAITING_FOR_PODS, waiting_detail(view))


def _running(view: View, old: Condition | None) -> _State:
    if view.settled is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    current = view.attempts.current
    if current is None or current.cause is not None or _is_held(view):
        return _State("False", Reason.WAITING_FOR_PODS, messages.BETWEEN_ATTEMPTS)
    # A report of pods that the queue took away since says nothing of those that came after them.
    recorded = {record.uid for record in current.pods}
    reported = view.report is not None and view.report.ranks >= view.ranks and view.report.pod_uid in recorded
    # A restarted operator has no reports in memory: what an earlier one saw in this attempt still holds.
    since = current.admitted_time or current.start_time
    known = old is not None and old.status == "True" and old.last_transition_time >= since
    if reported or known:
        return _State("True", Reason.RUNNING, messages.running(view.nodes, current.number))
    return _State("False", Reason.WAITING_FOR_PODS, waiting_detail(view))


def _checkpoint_available(status: FineTuneJobStatus, view: View) -> _State:
    """Return whether a pod's loss costs less than the run, and whether what it costs grows beyond what was asked."""
    whole = [checkpoint for checkpoint in status.checkpoints if not checkpoint.damaged]
    what = messages.checkpoint_available(whole[-1].step, len(whole)) if whole else messages.NO_CHECKPOINT
    available = "True" if whole else "False"
    report = view.report if view.settled is None and view.attempts.current is not None else None
    problem = getattr(report, "checkpoint_problem", "")
    if report is not None and problem:
        age = getattr(report, "checkpoint_age_seconds", None) or 0
        return _State(available, Reason.CHECKPOINT_OVERDUE, messages.checkpoint_overdue(what, age, problem))
    damaged = next((checkpoint for checkpoint in reversed(status.checkpoints) if checkpoint.damaged), None)
    if damaged is not None:
        what = messages.checkpoint_damaged(what, damaged.step, damaged.damaged)
    return _State(available, Reason.COMMITTED if whole else Reason.NONE_YET, what)


def waiting_detail(view: View) -> str:
    """Return what the attempt waits for, as one sentence."""
    return attempt_detail(view.pods, view.nodes, view.hint)
