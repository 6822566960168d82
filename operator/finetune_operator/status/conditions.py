"""Computes the conditions of a FineTuneJob, such as `Running` and `Succeeded`, with their reasons and messages.

Pure functions; `compute.py` calls them. `finetune_core.api.condition_reasons` explains each reason for users.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.api.conditions import Condition, ConditionType, Reason, valid_reason
from finetune_core.api.status import FineTuneJobStatus, PastAttempt
from finetune_operator import messages
from finetune_operator.decide.verdict import Verdict
from finetune_operator.observe.waiting import why_attempt_waits
from finetune_operator.status.inputs import StatusInput

MESSAGE_LIMIT = 2048
"""Largest number of characters of a condition's message. A longer message is cut."""


@dataclass(frozen=True, slots=True)
class _State:
    """Status, reason and message of a condition, without its type and times."""

    status: str
    reason: str
    message: str = ""


def compute_conditions(stored: FineTuneJobStatus, status: FineTuneJobStatus, given: StatusInput) -> list[Condition]:
    """Return all conditions that the operator knows, in the order of the API, and then all other stored conditions.

    ``stored`` is the status in the API server. ``status`` is the new status, in which everything but the conditions is
    computed already. A condition whose status did not change keeps its `lastTransitionTime`.
    """
    old = {condition.type: condition for condition in stored.conditions}
    kept = old if not given.observed and given.end is None else {}
    running = _state_of(kept.get(ConditionType.RUNNING)) or _running(given, old.get(ConditionType.RUNNING))
    succeeded = _succeeded(given, is_running=running.status == "True")
    states = {
        ConditionType.READY: _ready(given, succeeded),
        ConditionType.RECONCILING: _reconciling(given, succeeded),
        ConditionType.STALLED: _stalled(given),
        ConditionType.ACCEPTED: _accepted(given),
        ConditionType.SCHEDULED: _state_of(kept.get(ConditionType.SCHEDULED)) or _scheduled(given),
        ConditionType.RUNNING: running,
        ConditionType.CHECKPOINT_AVAILABLE: _checkpoint_available(status, given),
        ConditionType.SUCCEEDED: succeeded,
    }
    own = [_condition(kind, state, old.get(kind), given) for kind, state in states.items()]
    return own + [condition for condition in stored.conditions if condition.type not in states]


def _state_of(condition: Condition | None) -> _State | None:
    """Return status, reason and message of the stored ``condition``.

    Returns None where the condition is absent, or where its status is not True, False or Unknown.
    """
    if condition is None or condition.status not in ("True", "False", "Unknown"):
        return None
    return _State(condition.status, condition.reason, condition.message)


def _condition(kind: ConditionType, state: _State, old: Condition | None, given: StatusInput) -> Condition:
    unchanged = old is not None and old.status == state.status
    return Condition.model_validate(
        {
            "type": kind.value,
            "status": state.status,
            "observedGeneration": given.generation,
            "lastTransitionTime": old.last_transition_time if unchanged and old else given.now,
            "reason": valid_reason(state.reason),
            "message": state.message[:MESSAGE_LIMIT],
        }
    )


def _succeeded(given: StatusInput, *, is_running: bool) -> _State:
    """Return the condition `Succeeded`, which sums up the job. `kubectl get` shows its reason in the column State.

    ``is_running`` says whether the condition `Running` is True.
    """
    if given.end is not None:
        return _State("True" if given.end.succeeded else "False", given.end.reason, given.end.message)
    if given.problem is not None:
        return _State("Unknown", given.problem.reason, given.problem.message)
    if given.is_checked:
        return _State("Unknown", Reason.PREFLIGHT, given.missing or given.turn or messages.PREFLIGHT_RUNS)
    attempts = given.attempts
    current = attempts.current
    last = attempts.recent[-1] if attempts.recent else None
    if current is None:
        return _between_attempts(given, last)
    if given.held:
        return _held(given)
    if current.cause is not None and current.cause.verdict != Verdict.SUCCEEDED:
        return _State("Unknown", Reason.RETRYING, messages.retrying(current.number, current.cause.message, None))
    if is_running:
        return _State("Unknown", Reason.RUNNING, messages.running(given.nodes, current.number))
    detail = _why_waiting(given)
    prefix = messages.attempt_prefix(current.number, last.message if last else "")
    message = "; ".join(part for part in (prefix, detail) if part)
    return _State("Unknown", Reason.STARTING if given.pods else Reason.QUEUED, message)


def _between_attempts(given: StatusInput, last: PastAttempt | None) -> _State:
    """Return the condition `Succeeded` while no attempt is current; ``last`` is the attempt that ended last."""
    if last is not None and last.verdict == Verdict.PERMANENT:
        return _State("Unknown", last.reason, messages.pods_end(last.message, given.ending_pods))
    if given.policy.cancel:
        return _State("Unknown", Reason.CANCELLED, messages.pods_end(messages.CANCELLED, given.ending_pods))
    if given.policy.suspend:
        message = messages.pods_end(messages.SUSPENDED, given.ending_pods)
        return _State("Unknown", Reason.SUSPENDED, message if given.ending_pods else messages.SUSPENDED_REST)
    if last is None:
        return _State("Unknown", Reason.QUEUED, messages.NO_PODS)
    message = messages.retrying(last.number, last.message, given.attempts.next_start_time)
    return _State("Unknown", Reason.RETRYING, message)


def _held(given: StatusInput) -> _State:
    """Return the condition `Succeeded` of a job whose queue, or (without a queue) a person, has suspended the child."""
    if queue := given.policy.queue_name:
        return _State("Unknown", Reason.QUEUED, messages.pods_end(messages.queued(queue), given.ending_pods))
    return _State("Unknown", Reason.SUSPENDED, messages.SUSPENDED_ELSEWHERE)


def _ready(given: StatusInput, succeeded: _State) -> _State:
    return _State("True" if given.end and given.end.succeeded else "False", succeeded.reason, succeeded.message)


def _reconciling(given: StatusInput, succeeded: _State) -> _State:
    if given.end is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    return _State("True", Reason.IN_PROGRESS, succeeded.message)


def _stalled(given: StatusInput) -> _State:
    if given.end is not None and not given.end.succeeded:
        return _State("True", given.end.reason, given.end.message)
    if given.end is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    return _State("False", Reason.IN_PROGRESS)


def _accepted(given: StatusInput) -> _State:
    if given.invalid:
        return _State("False", Reason.BAD_INPUT, given.invalid)
    if given.problem is not None:
        return _State("False", given.problem.reason, given.problem.message)
    if given.is_checked:
        return _accepted_by_check(given)
    return _State("True", Reason.VALID, messages.VALID)


def _accepted_by_check(given: StatusInput) -> _State:
    """Return the condition `Accepted` of a job that waits for its preflight check, or whose check failed."""
    if given.end is not None and given.end.reason == Reason.BAD_INPUT:
        return _State("False", Reason.BAD_INPUT, given.end.message)
    if missing := given.end.message if given.end is not None else given.missing:
        return _State("False", Reason.OUTSIDE_FAILURE, missing)
    return _State("Unknown", Reason.PREFLIGHT, given.turn or messages.PREFLIGHT_RUNS)


def _scheduled(given: StatusInput) -> _State:
    if given.end is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    if given.attempts.current is None or given.held:
        return _State("False", Reason.WAITING_FOR_PODS, messages.BETWEEN_ATTEMPTS)
    placed = [pod for pod in given.pods if pod.node]
    if len(placed) >= given.nodes:
        return _State("True", Reason.SCHEDULED, messages.SCHEDULED)
    return _State("False", Reason.WAITING_FOR_PODS, _why_waiting(given))


def _running(given: StatusInput, old: Condition | None) -> _State:
    if given.end is not None:
        return _State("False", Reason.SETTLED, messages.SETTLED)
    current = given.attempts.current
    if current is None or current.cause is not None or given.held:
        return _State("False", Reason.WAITING_FOR_PODS, messages.BETWEEN_ATTEMPTS)
    # A report counts only if its pod is among the pods that the status records. The newest report may come from an
    # older pod: a queue such as Kueue suspended the attempt, and later admitted it with new pods.
    recorded = {record.uid for record in current.pods}
    reported = given.report is not None and given.report.ranks >= given.ranks and given.report.pod_uid in recorded
    # The condition stays True if it became True since the attempt was admitted, because a restarted operator has no
    # report in memory.
    since = current.admitted_time or current.start_time
    known = old is not None and old.status == "True" and old.last_transition_time >= since
    if reported or known:
        return _State("True", Reason.RUNNING, messages.running(given.nodes, current.number))
    return _State("False", Reason.WAITING_FOR_PODS, _why_waiting(given))


def _checkpoint_available(status: FineTuneJobStatus, given: StatusInput) -> _State:
    """Return the condition `CheckpointAvailable`: whether an undamaged checkpoint is committed.

    Where the trainer of the current attempt reports a problem with saving, the reason is CheckpointOverdue and the
    message names the problem. Otherwise the message names the newest damaged checkpoint, if there is one.
    """
    whole = [checkpoint for checkpoint in status.checkpoints if not checkpoint.damaged]
    what = messages.checkpoint_available(whole[-1].step, len(whole)) if whole else messages.NO_CHECKPOINT
    available = "True" if whole else "False"
    report = given.report if given.end is None and given.attempts.current is not None else None
    if report is not None and report.checkpoint_problem:
        message = messages.checkpoint_overdue(what, report.checkpoint_age_seconds or 0, report.checkpoint_problem)
        return _State(available, Reason.CHECKPOINT_OVERDUE, message)
    damaged = next((checkpoint for checkpoint in reversed(status.checkpoints) if checkpoint.damaged), None)
    if damaged is not None:
        what = messages.checkpoint_damaged(what, damaged.step, damaged.damaged)
    return _State(available, Reason.COMMITTED if whole else Reason.NONE_YET, what)


def _why_waiting(given: StatusInput) -> str:
    """Return, as one sentence, what the attempt waits for: pods that do not run yet, or the first report."""
    return why_attempt_waits(given.pods, given.nodes, given.warning)
