"""Orders of `runPolicy` in different states of a job: suspend, resume, cancel and the two deadlines."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.status import AttemptsStatus
from finetune_core.contract import Outcome
from finetune_operator.decide.accounting import SUSPENSIONS, backoff
from finetune_operator.decide.decision import Action
from finetune_operator.decide.states import JobState
from tests.operator.builders import advance, at, checkpoint, child, current, pod, result
from tests.operator.test_attempts import past, running, seen, seen_no_child

CANCEL, SUSPEND = {"cancel": True}, {"suspend": True}
DONE = result(Outcome.COMPLETED, with_artifact=True)
PENDING = {"pendingDeadlineSeconds": 60}
ACTIVE = {"activeDeadlineSeconds": 600}


def both(**changes: Any) -> list[Any]:
    return [pod(0, **changes), pod(1, **changes)]


# ---- suspend and resume ----


def test_suspend_closes_the_attempt_free_and_removes_it() -> None:
    step = advance(running(), seen(both(), policy=SUSPEND))
    last = step.attempts.recent[-1]
    assert (step.state, step.attempts.current) == (JobState.CLEANING_UP, None)
    assert (last.verdict, last.reason, step.attempts.charged, step.attempts.free) == ("Free", "Suspended", 0, 1)
    assert step.attempts.next_start_time is None


def test_a_suspended_job_rests_until_it_is_resumed_and_then_goes_on_at_once() -> None:
    closed = AttemptsStatus(started=1, free=1, recent=[past(1, "Free", -10, "Suspended")])
    ending = advance(closed, seen_no_child(now=20, pods=[pod(0, deleted=15)], policy=SUSPEND))
    assert (ending.state, ending.action, ending.attempts.started) == (JobState.CLEANING_UP, Action.NONE, 1)
    resting = advance(closed, seen_no_child(now=9999, policy=SUSPEND))
    assert (resting.state, resting.wait_seconds, resting.attempts) == (JobState.SUSPENDED, None, closed)
    assert advance(closed, seen_no_child(now=9999)).attempts.started == 2


def test_a_job_applied_suspended_starts_nothing() -> None:
    assert advance(AttemptsStatus(), seen_no_child(policy=SUSPEND)).state is JobState.SUSPENDED


def test_an_attempt_that_could_not_be_created_is_suspended_too() -> None:
    step = advance(running(current=current(indexes=())), seen_no_child(policy=SUSPEND))
    assert (step.state, step.attempts.free, step.attempts.current) == (JobState.CLEANING_UP, 1, None)


def test_success_is_not_undone_by_an_order() -> None:
    pods = both(exit_code=0, message=DONE)
    for policy in (SUSPEND, CANCEL, ACTIVE):
        step = advance(running(), seen(pods, policy=policy, active=9999))
        assert step.end is not None
        assert step.end.succeeded


def test_a_suspension_decides_before_a_failure_of_the_same_look() -> None:
    step = advance(running(), seen([pod(0, exit_code=64), pod(1)], policy=SUSPEND))
    assert (step.end, step.attempts.recent[-1].reason) == (None, "Suspended")


def test_a_failure_seen_before_the_suspension_is_accounted_as_what_it_was() -> None:
    first = advance(running(), seen([pod(0, exit_code=75), pod(1)])).attempts
    closed = advance(first, seen([pod(0, exit_code=75), pod(1)], now=11, policy=SUSPEND)).attempts
    assert (closed.charged, closed.free, closed.recent[-1].reason) == (1, 0, "OutsideFailure")


@pytest.mark.parametrize("reason", SUSPENSIONS)
def test_suspensions_are_never_charged_however_often(reason: str) -> None:
    recent = [past(n + 1, "Free", -1000 + n, reason) for n in range(6)]
    attempts = running(started=7, free=6, recent=recent, current=current(7))
    step = advance(attempts, seen([pod(i, attempt=7) for i in (0, 1)], policy=SUSPEND))
    assert (step.attempts.charged, step.attempts.free) == (0, 7)
    assert backoff(step.attempts, []).total_seconds() == 10


def test_a_job_that_was_suspended_998_times_ends_with_its_last_attempt() -> None:
    closed = AttemptsStatus(started=999, free=999, recent=[past(999, "Free", -9, "Suspended")])
    end = advance(closed, seen_no_child())
    assert end.end is not None
    assert (end.state, end.end.reason) == (JobState.FAILED, "RetriesExhausted")
    assert advance(closed.model_copy(update={"started": 998}), seen_no_child()).action is Action.OPEN_ATTEMPT


# ---- cancel ----


@pytest.mark.parametrize("pods", [both(), [pod(0, phase="Pending", container=None, node="")], []])
def test_cancel_removes_the_attempt_first_and_settles_once_its_pods_are_gone(pods: list[Any]) -> None:
    attempts = running(current=current(indexes=tuple(p.index for p in pods)))
    closed = advance(attempts, seen(pods, policy=CANCEL))
    assert (closed.state, closed.end) == (JobState.CLEANING_UP, None)
    assert (closed.attempts.charged, closed.attempts.free) == (0, 0)
    assert advance(closed.attempts, seen(pods, policy=CANCEL)).action is Action.REMOVE_ATTEMPT
    saving = seen_no_child(now=5, pods=[pod(0, deleted=1)], policy=CANCEL)
    assert advance(closed.attempts, saving).state is JobState.CLEANING_UP
    assert advance(closed.attempts, saving).action is Action.NONE
    end = advance(closed.attempts, seen_no_child(now=9, policy=CANCEL, checkpoints=[checkpoint(5)]))
    assert end.end is not None
    assert (end.end.succeeded, end.end.reason) == (False, "Cancelled")
    assert "s3://b/c" in end.end.message


@pytest.mark.parametrize(
    "attempts",
    [
        AttemptsStatus(),
        AttemptsStatus(started=1, charged=1, recent=[past(1, "Charged", -9)], next_start_time=at(300)),
        AttemptsStatus(started=1, free=1, recent=[past(1, "Free", -9, "Suspended")]),
    ],
    ids=["before the first attempt", "during the back-off", "while suspended"],
)
def test_cancel_settles_at_once_where_nothing_runs(attempts: AttemptsStatus) -> None:
    step = advance(attempts, seen_no_child(policy=CANCEL | SUSPEND))
    assert step.end is not None
    assert (step.state, step.end.reason) == (JobState.FAILED, "Cancelled")


def test_cancel_of_an_attempt_that_a_queue_holds() -> None:
    closed = advance(running(), seen([], child=child(suspended=True), policy=CANCEL))
    assert (closed.state, closed.attempts.recent[-1].reason) == (JobState.CLEANING_UP, "Cancelled")


# ---- the two deadlines ----


def waiting(*, admitted: float | None, runs: float | None = None) -> AttemptsStatus:
    times = {
        "admitted_time": None if admitted is None else at(admitted),
        "running_time": None if runs is None else at(runs),
    }
    return running(current=current(indexes=()).model_copy(update=times))


def test_the_pending_deadline_is_watched_to_the_second_and_names_what_was_waited_for() -> None:
    pods = [pod(0), pod(1, container=None, phase="Pending", node="", unschedulable="0/1 nodes are available")]
    attempts = waiting(admitted=0)
    step = advance(attempts, seen(pods, now=45, policy=PENDING))
    assert (step.action, step.wait_seconds) == (Action.NONE, 15)
    over = advance(attempts, seen(pods, now=60, policy=PENDING, waiting_for="pod worker-1: 0/1 nodes are available"))
    assert over.state is JobState.CLEANING_UP
    assert over.attempts.recent[-1].reason == "DeadlineExceeded"
    assert over.attempts.recent[-1].message.endswith("pod worker-1: 0/1 nodes are available")
    end = advance(over.attempts, seen_no_child(now=61, policy=PENDING))
    assert end.end is not None
    assert (end.end.reason, end.end.succeeded) == ("DeadlineExceeded", False)


def test_the_pending_deadline_bounds_what_stands_in_the_way_of_the_first_pod() -> None:
    attempts = waiting(admitted=0)
    assert (advance(attempts, seen_no_child(now=59, policy=PENDING)).wait_seconds, Action.CREATE_ATTEMPT) == (
        1,
        advance(attempts, seen_no_child(now=59, policy=PENDING)).action,
    )
    over = advance(attempts, seen_no_child(now=60, policy=PENDING, waiting_for="the API server refused PyTorchJob x"))
    assert "refused PyTorchJob x" in over.attempts.recent[-1].message


def test_the_pending_deadline_ends_once_all_pods_ran_and_begins_anew_with_the_next_attempt() -> None:
    ran = advance(waiting(admitted=0), seen(both(), now=30, policy=PENDING))
    assert ran.attempts.current is not None
    assert (ran.attempts.current.running_time, ran.wait_seconds) == (at(30), None)
    later = advance(ran.attempts, seen([pod(0), pod(1, container=None)], now=500, policy=PENDING))
    assert (later.action, later.end) == (Action.NONE, None)
    opened = advance(
        AttemptsStatus(started=1, free=1, recent=[past(1, "Free", -9)]), seen_no_child(now=700, policy=PENDING)
    )
    assert opened.attempts.current is not None
    assert opened.attempts.current.admitted_time == at(700)


def test_a_queue_stops_both_clocks_and_admission_starts_the_pending_one_anew() -> None:
    attempts = waiting(admitted=0, runs=10)
    held = advance(attempts, seen([pod(0, deleted=20)], now=30, child=child(suspended=True), policy=PENDING | ACTIVE))
    assert held.attempts.current is not None
    assert (held.attempts.current.admitted_time, held.attempts.current.running_time) == (None, None)
    assert (held.attempts.current.pods, held.wait_seconds) == ([], None)
    assert advance(held.attempts, seen([], now=9999, child=child(suspended=True), policy=PENDING)).action is Action.NONE
    resumed = child(resumed_at=at(10_000))
    admitted = advance(held.attempts, seen([], now=10_005, child=resumed, policy=PENDING))
    assert admitted.attempts.current is not None
    assert (admitted.attempts.current.admitted_time, admitted.wait_seconds) == (at(10_000), 55)


def test_a_suspension_that_was_over_before_it_was_seen_ends_nothing() -> None:
    attempts = running(current=current().model_copy(update={"admitted_time": at(0), "running_time": at(5)}))
    old = [pod(0, deleted=50), pod(1, deleted=50)]
    new = [pod(0, uid="new-0"), pod(1, uid="new-1", container=None)]
    step = advance(attempts, seen([*old, *new], now=56, child=child(resumed_at=at(55))))
    assert step.action is Action.NONE
    assert step.attempts.current is not None
    assert step.attempts.current.cause is None
    assert [record.uid for record in step.attempts.current.pods] == ["new-0", "new-1"]
    assert (step.attempts.current.admitted_time, step.attempts.current.running_time) == (at(55), None)


def test_the_active_deadline_counts_over_all_attempts_and_is_watched_to_the_second() -> None:
    step = advance(running(), seen(both(), policy=ACTIVE, active=590))
    assert (step.action, step.wait_seconds) == (Action.NONE, 10)
    assert advance(running(), seen(both(container=None), policy=ACTIVE, active=590)).wait_seconds is None
    over = advance(running(), seen(both(), policy=ACTIVE, active=600))
    assert (over.state, over.attempts.recent[-1].verdict) == (JobState.CLEANING_UP, "Permanent")
    end = advance(over.attempts, seen_no_child(now=9, policy=ACTIVE, active=640, checkpoints=[checkpoint(1)]))
    assert end.end is not None
    assert end.end.reason == "DeadlineExceeded"
    assert "600 s of `runPolicy.activeDeadlineSeconds`" in end.end.message


def test_no_attempt_follows_once_the_active_time_is_used_up() -> None:
    closed = AttemptsStatus(started=1, charged=1, recent=[past(1, "Charged", -9)], next_start_time=at(10))
    end = advance(closed, seen_no_child(now=1, policy=ACTIVE, active=601))
    assert end.end is not None
    assert end.end.reason == "DeadlineExceeded"


def test_a_failure_decides_before_a_deadline_only_where_it_was_seen_before() -> None:
    first = advance(running(), seen([pod(0, exit_code=1), pod(1)], policy=ACTIVE, active=599)).attempts
    closed = advance(first, seen([pod(0, exit_code=1), pod(1)], now=11, policy=ACTIVE, active=610)).attempts
    assert closed.recent[-1].reason == "Crashed"
