"""How attempts begin and end: each attempt starts only after its back-off, gets its number once, and is counted
once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import (
    AttemptCause,
    AttemptsStatus,
    FineTuneJobStatus,
    PastAttempt,
    PreflightStatus,
    UsageStatus,
)
from finetune_core.contract import Outcome
from finetune_operator.decide.accounting import backoff
from finetune_operator.decide.decision import Action
from finetune_operator.decide.state_machine import decide
from finetune_operator.decide.states import JobState
from finetune_operator.objects.observations import PodObservation
from finetune_operator.observe.observation import JobObservation, PreflightObservation
from tests.operator.builders import CHILD_UID, NOW, advance, at, checkpoint, child, current, pod, result

DONE = result(Outcome.COMPLETED, with_artifact=True)


def seen(
    pods: list[PodObservation], *, now: float = 0, active: int = 0, policy: Any = None, **changes: Any
) -> JobObservation:
    """Return an observation of attempt 1 with its PyTorchJob.

    ``active`` is the time in seconds for which pods of the job have run so far.
    """
    values: dict[str, Any] = {
        "now": at(now),
        "nodes": 2,
        "policy": RunPolicySpec(**(policy or {})),
        "usage": UsageStatus(active_seconds=active),
        "waiting_for": "",
        "child": child(),
        "child_uid": CHILD_UID,
        "pods": pods,
        "checkpoints": [],
        "final_result": None,
    }
    return JobObservation(**(values | changes))


def seen_no_child(now: float = 0, *, pods: list[PodObservation] | None = None, **changes: Any) -> JobObservation:
    """Return an observation of a job whose PyTorchJob does not exist."""
    return seen(pods or [], now=now, **({"child": None, "child_uid": ""} | changes))


def running(**changes: Any) -> AttemptsStatus:
    return AttemptsStatus(**({"started": 1, "current": current()} | changes))


def past(number: int, verdict: str, start: float, reason: str = "Crashed") -> PastAttempt:
    return PastAttempt(number=number, verdict=verdict, reason=reason, start_time=at(start), end_time=at(start + 1))


def test_the_first_attempt_is_numbered_before_anything_exists() -> None:
    step = advance(AttemptsStatus(), seen_no_child())
    assert (step.action, step.attempts.started) == (Action.OPEN_ATTEMPT, 1)
    assert step.attempts.current is not None
    assert step.attempts.current.number == 1


def test_a_numbered_attempt_without_child_is_created() -> None:
    opened = advance(AttemptsStatus(), seen_no_child()).attempts
    assert advance(opened, seen_no_child()).action is Action.CREATE_ATTEMPT


def test_the_first_pod_of_each_index_is_recorded_and_stays() -> None:
    attempts = running(current=current(indexes=()))
    step = advance(attempts, seen([pod(0), pod(1, node="")]))
    assert step.attempts.current is not None
    assert [(record.index, record.uid, record.node) for record in step.attempts.current.pods] == [
        (0, "pod-0", "node-0"),
        (1, "pod-1", ""),
    ]
    again = advance(step.attempts, seen([pod(0), pod(1)]))
    assert again.attempts.current is not None
    assert again.attempts.current.pods[1].node == "node-1"


def test_the_cause_is_recorded_at_first_sight_and_the_others_get_ten_seconds() -> None:
    pods = [pod(0, exit_code=75), pod(1)]
    step = advance(running(), seen(pods))
    assert step.attempts.current is not None
    assert step.attempts.current.cause is not None
    assert (step.attempts.current.cause.reason, step.action, step.wait_seconds) == ("OutsideFailure", Action.NONE, 10)
    later = advance(step.attempts, seen([pods[0], pod(1, exit_code=64)], now=2))
    assert later.end is not None
    assert later.end.reason == "BadInput"


def test_a_failed_attempt_is_accounted_once_and_its_objects_go_before_the_next() -> None:
    pods = [pod(0, exit_code=1), pod(1, exit_code=75)]
    closed = advance(running(), seen(pods)).attempts
    assert (closed.started, closed.charged, closed.free, closed.current) == (1, 1, 0, None)
    assert closed.recent[0].reason == "Crashed"
    assert closed.next_start_time == at(10)
    assert advance(closed, seen(pods)).action is Action.REMOVE_ATTEMPT
    assert advance(closed, seen(pods)).attempts == closed
    # The PyTorchJob is gone but its pods still exist, so no attempt starts.
    assert advance(closed, seen_no_child(now=59, pods=pods)).action is Action.NONE
    # The garbage collector has had a minute to delete the pods, so the operator deletes them itself.
    assert advance(closed, seen_no_child(now=60, pods=pods)).action is Action.REMOVE_ORPHANS
    opened = advance(closed, seen_no_child(now=10))
    assert (opened.action, opened.attempts.started) == (Action.OPEN_ATTEMPT, 2)


def test_a_pod_that_a_dead_kubelet_keeps_is_waited_for_a_minute_beyond_its_grace() -> None:
    closed = AttemptsStatus(started=1, free=1, recent=[past(1, "Free", -10)])
    stuck = [pod(1, deleted=0, grace=90)]
    waiting = advance(closed, seen_no_child(now=100, pods=stuck))
    assert (waiting.action, waiting.wait_seconds) == (Action.NONE, 50)
    assert advance(closed, seen_no_child(now=150, pods=stuck)).action is Action.OPEN_ATTEMPT


def test_nothing_starts_before_the_back_off_ended() -> None:
    closed = AttemptsStatus(started=1, charged=1, recent=[past(1, "Charged", -10)], next_start_time=at(10))
    assert advance(closed, seen_no_child(now=9)).state is JobState.BACKING_OFF
    assert advance(closed, seen_no_child(now=10)).action is Action.OPEN_ATTEMPT


def test_success_settles_the_job_with_the_artifact() -> None:
    step = advance(running(), seen([pod(i, exit_code=0, message=DONE) for i in (0, 1)]))
    assert step.state is JobState.SUCCEEDED
    assert step.end is not None
    assert step.end.succeeded
    assert step.end.result is not None
    assert (step.attempts.charged, step.attempts.free, step.attempts.recent[-1].verdict) == (0, 0, "Succeeded")


def test_a_required_score_that_was_not_reached_ends_the_job_with_its_artifact_and_no_charge() -> None:
    gate = result(Outcome.GATE_FAILED, "exact is 0.5", with_artifact=True)
    step = advance(running(), seen([pod(0, exit_code=0, message=gate), pod(1, exit_code=0)]))
    assert step.state is JobState.FAILED
    assert step.end is not None
    assert (step.end.succeeded, step.end.reason, step.end.message) == (False, "GateFailed", "exact is 0.5")
    assert step.end.result is not None
    assert step.end.result.artifact is not None
    assert (step.attempts.charged, step.attempts.current, step.attempts.recent[-1].verdict) == (0, None, "Permanent")


@pytest.mark.parametrize(("charged_before", "settled"), [(2, None), (3, "RetriesExhausted")])
def test_max_retries_counts_charged_attempts_beyond_the_first(charged_before: int, settled: str | None) -> None:
    attempts = running(started=charged_before + 1, charged=charged_before, current=current(charged_before + 1))
    pods = [pod(i, exit_code=1, attempt=charged_before + 1) for i in (0, 1)]
    step = advance(attempts, seen(pods))
    assert (step.end.reason if step.end else None) == settled


@pytest.mark.parametrize(
    ("row", "checkpoints", "expected"),
    [(2, [], "Free"), (3, [], "Charged"), (3, [checkpoint(-50)], "Free"), (3, [checkpoint(-5000)], "Charged")],
    ids=["third", "fourth", "fourth with a new checkpoint", "fourth with an old checkpoint"],
)
def test_free_attempts_in_a_row_need_a_new_checkpoint(row: int, checkpoints: list[Any], expected: str) -> None:
    recent = [past(n + 1, "Free", -1000 + n) for n in range(row)]
    attempts = running(started=row + 1, free=row, recent=recent, current=current(row + 1))
    pods = [pod(i, attempt=row + 1, exit_code=143, deleted=-20) for i in (0, 1)]
    step = advance(attempts, seen(pods, checkpoints=checkpoints))
    assert step.attempts.recent[-1].verdict == expected


def test_back_off_doubles_while_nothing_is_committed() -> None:
    recent = [past(n + 1, "Charged", -1000 + n) for n in range(8)]
    rows = [backoff(AttemptsStatus(recent=recent[:n]), []) for n in range(1, 9)]
    assert rows == [timedelta(seconds=seconds) for seconds in (10, 20, 40, 80, 160, 300, 300, 300)]
    assert backoff(AttemptsStatus(recent=recent), [checkpoint(0)]) == timedelta(seconds=10)


def test_suspension_forgets_the_pods_and_ends_nothing() -> None:
    step = advance(running(), seen([pod(0, deleted=0)], child=child(suspended=True)))
    assert step.attempts.current is not None
    assert step.attempts.current.pods == []
    assert step.action is Action.NONE


def test_recent_attempts_are_bounded() -> None:
    recent = [past(n + 1, "Free", -10_000 + n) for n in range(20)]
    attempts = running(started=21, recent=recent, current=current(21))
    step = advance(attempts, seen([pod(i, attempt=21, exit_code=1) for i in (0, 1)]))
    assert [item.number for item in step.attempts.recent] == list(range(2, 22))


def test_now_is_the_only_clock() -> None:
    assert advance(AttemptsStatus(), seen_no_child()).attempts.current.start_time == NOW  # type: ignore[union-attr]


def test_pauses_that_a_leader_with_a_wrong_clock_recorded_are_not_waited_for() -> None:
    between = AttemptsStatus(started=1, charged=1, recent=[past(1, "Charged", -100)], next_start_time=at(86400))
    assert advance(between, seen_no_child()).action is Action.OPEN_ATTEMPT
    cause = AttemptCause(verdict="Free", reason="PodDeleted", message="m", time=at(86400))
    ending = running(current=current().model_copy(update={"cause": cause}))
    assert advance(ending, seen([pod(0), pod(1)])).attempts.current is None


@pytest.mark.parametrize("seconds", [10**9, 2**62, 2**63 - 1])
def test_a_deadline_of_another_version_may_be_longer_than_any_time(seconds: int) -> None:
    policy = RunPolicySpec.model_construct(pending_deadline_seconds=seconds, active_deadline_seconds=seconds)
    waiting = running(current=current(indexes=()).model_copy(update={"admitted_time": at(-10)}))
    step = advance(waiting, replace(seen([], policy=None), policy=policy))
    assert step.wait_seconds == pytest.approx(seconds - 10)
    record = PreflightStatus(start_time=at(-10))
    check = replace(seen_no_child(), policy=policy, preflight=PreflightObservation(enabled=True))
    assert decide(FineTuneJobStatus(preflight=record), check).action is Action.CREATE_PREFLIGHT_POD
