"""A rank whose training thread waits in a call that never returns leaves soon after the other ranks, with a reason and
with the stacks of its threads. A training thread that comes back is left alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from finetune_core.contract import Outcome
from finetune_trainer.pod.outcomes import read_outcome
from finetune_trainer.ranks.return_guard import LEAST_SECONDS, MOST_SECONDS, ReturnGuard, return_seconds
from tests.trainer.hanging import LEAVES, LEFT, STOPS
from tests.trainer.zygote import ends_of, zygote


class Recorder:
    """Takes the place of the watchdog, and notes why the process would have ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, bool]] = []
        self.ended = threading.Event()

    def end_process(self, message: str, *, caused_by_peer: bool) -> None:
        self.ends.append((message, caused_by_peer))
        self.ended.set()


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def guarded() -> tuple[ReturnGuard, Recorder, Clock]:
    recorder, clock = Recorder(), Clock()
    return ReturnGuard(recorder, clock=clock), recorder, clock


@pytest.mark.parametrize(
    ("pause", "seconds"),
    [(0.0, LEAST_SECONDS), (1.0, LEAST_SECONDS), (5.0, 15.0), (15.0, MOST_SECONDS), (600.0, MOST_SECONDS)],
)
def test_the_bound_grows_with_the_longest_call_so_far(pause: float, seconds: float) -> None:
    assert return_seconds(pause) == seconds


def test_a_thread_that_does_not_come_back_ends_the_process_once() -> None:
    guard, recorder, clock = guarded()
    guard.demand("rank 0 is gone", caused_by_peer=True)
    assert guard.check() == LEAST_SECONDS
    clock.now += LEAST_SECONDS
    guard.check()
    guard.check()
    wanted = "rank 0 is gone, and the training thread did not return from its call within 10 s"
    assert recorder.ends == [(wanted, True)]


def test_a_thread_that_comes_back_is_left_alone() -> None:
    guard, recorder, clock = guarded()
    guard.demand("rank 0 is gone", caused_by_peer=True)
    clock.now += LEAST_SECONDS - 1
    guard.passed()
    clock.now += 10 * LEAST_SECONDS
    assert guard.check() is None
    assert recorder.ends == []


def test_the_demand_with_the_earlier_end_stands() -> None:
    guard, recorder, clock = guarded()
    guard.demand("told to stop", caused_by_peer=False, seconds=40)
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=10)
    guard.demand("told to stop again", caused_by_peer=False, seconds=30)
    clock.now += 10
    guard.check()
    assert [caused_by_peer for _, caused_by_peer in recorder.ends] == [True]


def test_the_longest_pause_is_measured() -> None:
    guard, _, clock = guarded()
    for pause in (2.0, 7.0, 1.0):
        clock.now += pause
        guard.passed()
    assert guard.longest_pause == 7.0


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    guard, recorder, clock = guarded()
    with guard.within(20, "the copy of the training state"):
        clock.now += 19
        assert guard.check() == 1
    clock.now += 100
    assert guard.check() is None
    assert recorder.ends == []


def test_a_block_that_takes_too_long_ends_the_process_and_is_never_left() -> None:
    guard, recorder, clock = guarded()
    inside, release, outside = threading.Event(), threading.Event(), threading.Event()

    def copy() -> None:
        with guard.within(20, "the copy of the training state"):
            inside.set()
            release.wait(30)
        outside.set()

    threading.Thread(target=copy, daemon=True).start()
    assert inside.wait(30)
    clock.now += 20
    guard.check()
    assert recorder.ended.wait(30)
    release.set()
    # The message of the guard stands. The training thread must not write another outcome.
    assert not outside.wait(0.2)
    assert [message.partition(",")[0] for message, _ in recorder.ends] == [
        "the copy of the training state takes too long"
    ]


def test_the_thread_of_the_guard_acts_by_itself() -> None:
    recorder = Recorder()
    guard = ReturnGuard(recorder)
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=0.01)
    assert recorder.ended.wait(30)
    assert len(recorder.ends) == 1


@pytest.mark.gang
def test_a_rank_that_waits_in_a_call_without_end_leaves_after_rank_0(tmp_path: Path) -> None:
    """The call holds no lock of Python, and no exception can end it: the C library's `read` of an empty pipe."""
    ranks = zygote().start_ranks("tests.trainer.hanging", [[str(tmp_path), LEAVES]] * 2, tmp_path)
    assert ends_of(ranks) == [LEFT, 75]
    outcome = read_outcome(tmp_path, 1)
    assert outcome is not None
    assert outcome.caused_by_peer
    assert outcome.result.outcome is Outcome.OUTSIDE_FAILURE
    assert outcome.result.step == 12
    assert outcome.result.message.startswith("rank 0 is gone, and the training thread did not return")
    log = (tmp_path / "rank-1.log").read_text()
    assert "the stacks of all threads of rank 1:" in log
    assert "a_call_that_never_returns" in log


@pytest.mark.gang
def test_a_rank_that_waits_in_a_call_without_end_leaves_after_sigterm(tmp_path: Path) -> None:
    """Rank 0 receives SIGTERM and waits for the agreement to stop, to which rank 1 never comes. The rank whose bound
    ends first tells the other rank, and is the cause. Which rank that is depends on when each learned of the
    signal."""
    ranks = zygote().start_ranks("tests.trainer.hanging", [[str(tmp_path), STOPS]] * 2, tmp_path)
    assert ends_of(ranks) == [75, 75]
    outcomes = [outcome for rank in range(2) if (outcome := read_outcome(tmp_path, rank)) is not None]
    assert len(outcomes) == 2
    assert not all(outcome.caused_by_peer for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.result.message.startswith("told to stop, and the training thread did not return")
    assert "a_call_that_never_returns" in (tmp_path / "rank-1.log").read_text()
