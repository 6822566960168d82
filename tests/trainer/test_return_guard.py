"""A rank whose training thread waits in a call that never returns leaves soon after the other ranks, with a reason and
with the stacks of its threads. A training thread that comes back is left alone."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest

from finetune_core.contract import Identity, Outcome, RunConfig
from finetune_trainer.pod.outcomes import WorkerOutcome, read_outcome
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import STOP_COMMIT_SECONDS, Paths
from finetune_trainer.ranks import return_guard
from finetune_trainer.ranks.return_guard import (
    LEAST_SECONDS,
    MOST_SECONDS,
    PAUSES,
    POLL_SECONDS,
    ReturnGuard,
    copy_seconds,
    least_seconds,
    return_seconds,
)
from finetune_trainer.ranks.watchdog import ANNOUNCE_SECONDS
from tests.trainer import tiny
from tests.trainer.hanging import AGREES, COPIES, LEAVES, LEFT, STOPS
from tests.trainer.hanging_worker import BEFORE
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.zygote import END_SECONDS, ends_of, zygote


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


def stepping(pause: float = 1.0) -> tuple[ReturnGuard, Recorder, Clock]:
    """Return a guard whose training thread has come back twice, with ``pause`` seconds in between."""
    guard, recorder, clock = guarded()
    guard.passed()
    clock.now += pause
    guard.passed()
    return guard, recorder, clock


# ---- how long a call may take ----


@pytest.mark.parametrize(
    ("pause", "seconds"),
    [(0.0, LEAST_SECONDS), (1.0, LEAST_SECONDS), (5.0, 15.0), (15.0, MOST_SECONDS), (600.0, MOST_SECONDS)],
)
def test_the_bound_grows_with_the_longest_call_so_far(pause: float, seconds: float) -> None:
    assert return_seconds(pause) == seconds


def test_a_rank_leaves_within_15_seconds_of_the_agreement_to_stop() -> None:
    assert return_seconds(LEAST_SECONDS / PAUSES) + POLL_SECONDS + ANNOUNCE_SECONDS <= 15
    assert copy_seconds(0) + POLL_SECONDS + ANNOUNCE_SECONDS <= 15
    assert MOST_SECONDS + ANNOUNCE_SECONDS < STOP_COMMIT_SECONDS


@pytest.mark.parametrize(
    ("amount", "seconds"), [(0, LEAST_SECONDS), (20 * 10**9, LEAST_SECONDS + 10), (10**12, MOST_SECONDS)]
)
def test_the_bound_of_a_copy_grows_with_its_bytes(amount: int, seconds: float) -> None:
    assert copy_seconds(amount) == seconds


def test_on_cpus_every_call_has_the_longest_bound() -> None:
    """Nothing waits there in a kernel of NCCL, and a call may be slow because other processes have the cores."""
    assert (least_seconds("GPU"), least_seconds("CPU")) == (LEAST_SECONDS, MOST_SECONDS)
    assert copy_seconds(0, least=least_seconds("CPU")) == MOST_SECONDS
    recorder, clock = Recorder(), Clock()
    guard = ReturnGuard(recorder, least=least_seconds("CPU"), clock=clock)
    guard.passed()
    clock.now += 1
    guard.passed()
    assert guard.allowed_seconds == MOST_SECONDS
    guard.demand("rank 0 is gone", caused_by_peer=True)
    assert guard.seconds_left == MOST_SECONDS


def test_the_longest_pause_is_measured_between_two_returns() -> None:
    guard, _, clock = guarded()
    clock.now += 300
    assert guard.longest_pause is None
    guard.passed()
    assert guard.longest_pause is None, "the time before the first return is that of the start"
    for pause in (2.0, 7.0, 1.0):
        clock.now += pause
        guard.passed()
    assert guard.longest_pause == 7.0
    assert guard.allowed_seconds == 21.0


def test_work_that_is_done_once_is_no_measure_for_a_call() -> None:
    """Loading takes minutes. Otherwise the bound would be the longest one in each training."""
    guard, _, clock = stepping(2.0)
    clock.now += 1
    with guard.long_work():
        clock.now += 200
        guard.passed()
        with guard.long_work():
            clock.now += 200
        clock.now += 200
    clock.now += 3
    guard.passed()
    assert guard.longest_pause == 3.0


def test_a_call_before_the_first_pause_and_in_long_work_has_the_longest_bound() -> None:
    guard, _, _ = guarded()
    assert guard.allowed_seconds == MOST_SECONDS
    guard, _, _ = stepping()
    assert guard.allowed_seconds == LEAST_SECONDS
    with guard.long_work():
        assert guard.allowed_seconds == MOST_SECONDS
    assert guard.allowed_seconds == LEAST_SECONDS


# ---- demands ----


def test_a_thread_that_does_not_come_back_ends_the_process_once() -> None:
    guard, recorder, clock = guarded()
    guard.demand("rank 0 is gone", caused_by_peer=True)
    assert guard.seconds_left == LEAST_SECONDS
    clock.now += LEAST_SECONDS
    assert recorder.ended.wait(30)
    assert guard.seconds_left is None
    wanted = "rank 0 is gone, and the training thread did not return from its call within 9 s"
    assert recorder.ends == [(wanted, True)]


def test_a_thread_that_came_back_must_come_back_from_its_next_call_too() -> None:
    guard, recorder, clock = guarded()
    guard.demand("rank 0 is gone", caused_by_peer=True)
    for _ in range(3):
        clock.now += LEAST_SECONDS - 1
        guard.passed()
        assert guard.seconds_left == LEAST_SECONDS
    assert recorder.ends == []
    clock.now += LEAST_SECONDS
    assert recorder.ended.wait(30)


def test_the_demand_with_the_earlier_end_stands() -> None:
    guard, recorder, clock = guarded()
    guard.demand("told to leave", caused_by_peer=False, seconds=40)
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=10)
    guard.demand("told to leave again", caused_by_peer=False, seconds=30)
    assert guard.seconds_left == 10
    clock.now += 10
    assert recorder.ended.wait(30)
    assert [caused_by_peer for _, caused_by_peer in recorder.ends] == [True]


def test_an_older_demand_that_ends_sooner_counts_until_the_thread_comes_back() -> None:
    guard, _, clock = guarded()
    guard.demand("told to leave", caused_by_peer=False, seconds=40)
    clock.now += 35
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=10)
    assert guard.seconds_left == 5
    guard.passed()
    assert guard.seconds_left == 10


def test_a_demand_that_is_made_again_gives_no_more_time() -> None:
    guard, _, clock = guarded()
    for _ in range(5):
        guard.demand("rank 0 is gone", caused_by_peer=True)
        clock.now += 1
    assert guard.seconds_left == LEAST_SECONDS - 5


# ---- a stop ----


def test_a_stop_bounds_every_call_from_then_on() -> None:
    guard, recorder, clock = stepping()
    clock.now += 4
    guard.stop_requested = lambda: True
    assert guard.seconds_left == LEAST_SECONDS, "the time before the stop does not count"
    for _ in range(3):
        clock.now += LEAST_SECONDS - 1
        guard.passed()
        assert guard.seconds_left == LEAST_SECONDS, "a call after the stop is no measure for the next one"
    assert recorder.ends == []
    clock.now += LEAST_SECONDS
    assert recorder.ended.wait(30)
    wanted = "told to stop, and the training thread did not return from its call within 9 s"
    assert recorder.ends == [(wanted, False)]


def test_the_bound_after_a_stop_follows_the_calls_so_far() -> None:
    guard, _, clock = stepping(5.0)
    guard.stop_requested = lambda: True
    assert guard.seconds_left == 15
    with guard.long_work():
        assert guard.seconds_left == MOST_SECONDS
        clock.now += 100
        guard.passed()
        guard.demand("rank 0 is gone", caused_by_peer=True)
        assert guard.seconds_left == LEAST_SECONDS, "a lost rank needs no patience"
    assert guard.seconds_left == LEAST_SECONDS


def test_nothing_is_demanded_without_a_stop() -> None:
    guard, recorder, clock = stepping()
    clock.now += 1000
    assert guard.seconds_left is None
    assert not recorder.ended.wait(3 * POLL_SECONDS)


# ---- blocks ----


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    guard, recorder, clock = guarded()
    with guard.within(20, "the copy of the training state"):
        clock.now += 19
        assert guard.seconds_left == 1
    clock.now += 100
    assert guard.seconds_left is None
    assert recorder.ends == []


def test_a_block_is_bounded_however_often_the_thread_comes_back_in_it() -> None:
    guard, _, clock = stepping()
    guard.stop_requested = lambda: True
    with guard.within(20, "the copy of the training state"):
        for left in (15, 10, 5):
            clock.now += 5
            guard.passed()
            assert guard.seconds_left == left


def test_a_block_has_its_own_time_instead_of_that_of_a_call() -> None:
    guard, _, clock = stepping()
    guard.stop_requested = lambda: True
    with guard.within(40, "the copy of the training state"):
        assert guard.seconds_left == 40
        clock.now += 30
        with guard.within(20, "the copy of one parameter"):
            assert guard.seconds_left == 10, "a block has to end within all bounds around it"
        guard.demand("rank 0 is gone", caused_by_peer=True)
        assert guard.seconds_left == LEAST_SECONDS
    assert guard.seconds_left == LEAST_SECONDS
    assert guard.longest_pause == 1.0, "a block is no measure for a call"


def test_an_error_in_a_block_ends_the_block() -> None:
    guard, _, clock = guarded()
    with pytest.raises(ZeroDivisionError), guard.long_work(), guard.within(20, "the copy of the training state"):
        raise ZeroDivisionError
    clock.now += 100
    assert guard.seconds_left is None
    guard.passed()
    clock.now += 1
    guard.passed()
    assert guard.allowed_seconds == MOST_SECONDS, "100 s were measured after the block"


# ---- threads ----


@pytest.mark.parametrize("leaves", ["passed", "long_work", "within", "stand_down"])
def test_a_thread_that_comes_back_too_late_never_goes_on(leaves: str) -> None:
    """The message of the guard stands. The training thread must not write another outcome."""
    made, inside, release, outside = (threading.Event() for _ in range(4))
    recorder, clock = Recorder(), Clock()
    guards: list[ReturnGuard] = []

    def train() -> None:
        guard = ReturnGuard(recorder, clock=clock)
        guards.append(guard)
        made.set()
        blocks = {"long_work": guard.long_work(), "within": guard.within(20, "the copy of the training state")}
        with blocks.get(leaves, contextlib.nullcontext()):
            guard.demand("rank 0 is gone", caused_by_peer=True)
            inside.set()
            release.wait(30)
        if leaves in ("passed", "stand_down"):
            getattr(guard, leaves)()
        outside.set()

    threading.Thread(target=train, daemon=True).start()
    assert inside.wait(30)
    clock.now += 20
    assert recorder.ended.wait(30)
    release.set()
    assert not outside.wait(0.2)
    assert len(recorder.ends) == 1


def test_a_guard_that_stood_down_ends_nothing() -> None:
    guard, recorder, clock = guarded()
    guard.stop_requested = lambda: True
    guard.demand("rank 0 is gone", caused_by_peer=True)
    guard.stand_down()
    clock.now += 1000
    assert guard.seconds_left is None
    assert not recorder.ended.wait(3 * POLL_SECONDS)


def test_another_thread_can_not_hide_that_the_training_thread_hangs() -> None:
    guard, recorder, clock = guarded()
    guard.demand("rank 0 is gone", caused_by_peer=True)
    clock.now += LEAST_SECONDS - 1
    other = threading.Thread(target=guard.passed)
    other.start()
    other.join(30)
    assert guard.seconds_left == 1
    clock.now += 1
    assert recorder.ended.wait(30)


def test_the_thread_of_the_guard_acts_by_itself() -> None:
    recorder = Recorder()
    guard = ReturnGuard(recorder)
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=0.01)
    assert recorder.ended.wait(30)
    assert len(recorder.ends) == 1


def test_a_sooner_demand_wakes_the_thread_of_the_guard() -> None:
    """The guard waits for the first demand when the second one is made, or is about to wait for it."""
    recorder = Recorder()
    guard = ReturnGuard(recorder)
    guard.demand("told to leave", caused_by_peer=False, seconds=3600)
    guard.demand("rank 0 is gone", caused_by_peer=True, seconds=0.01)
    assert recorder.ended.wait(30)
    assert [caused_by_peer for _, caused_by_peer in recorder.ends] == [True]


def test_a_sooner_demand_is_not_missed_while_the_guard_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sooner demand is made by another thread at the moment when the guard reads the clock, right before it waits
    for the first demand."""
    monkeypatch.setattr(return_guard, "POLL_SECONDS", 3600.0)
    recorder, asked = Recorder(), threading.Event()
    test_thread = threading.get_ident()

    def clock() -> float:
        if guards and threading.get_ident() != test_thread and not asked.is_set():
            asked.set()
            threading.Thread(target=sooner, daemon=True).start()
        return time.monotonic()

    def sooner() -> None:
        guards[0].demand("rank 0 is gone", caused_by_peer=True, seconds=0.01)

    guards: list[ReturnGuard] = []
    guards.append(ReturnGuard(recorder, clock=clock))
    guards[0].demand("told to leave", caused_by_peer=False, seconds=3600)
    assert recorder.ended.wait(30)
    assert [caused_by_peer for _, caused_by_peer in recorder.ends] == [True]


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
@pytest.mark.parametrize("event", [STOPS, AGREES])
def test_a_rank_that_hangs_before_or_after_the_agreement_to_stop_leaves(tmp_path: Path, event: str) -> None:
    """Rank 0 receives SIGTERM and waits for the agreement to stop, to which rank 1 never comes. Or both ranks agree, so
    that the training thread came back once, and rank 1 hangs after that, which must not end the demand.

    The rank whose bound ends first tells the other rank, and is the cause. Which rank that is depends on when each
    learned of the signal."""
    outcomes = outcomes_of(tmp_path, event)
    assert not all(outcome.caused_by_peer for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.result.message.startswith("told to stop, and the training thread did not return")


@pytest.mark.gang
def test_a_rank_that_hangs_in_the_copy_of_its_training_state_leaves(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 without a bound of its own, so rank 1 is the cause."""
    first, second = outcomes_of(tmp_path, COPIES)
    assert (first.caused_by_peer, second.caused_by_peer) == (True, False)
    for outcome in (first, second):
        assert outcome.result.message.startswith("the copy of the training state takes too long, and the training")


@pytest.mark.gang
def test_a_worker_that_hangs_in_a_backward_pass_leaves_after_sigterm(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """The whole worker runs, whose watchdog would wait for 600 s."""
    config = run_config(store, "hangs", world__nodes=1, dataset__validation=None, optimization__zeroStage=2)
    inputs = Inputs(model=tiny_model, train=tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1)))
    plan = WorkerPlan(
        paths=Paths(credentials=store.credentials, scratch=tmp_path),
        identity=Identity(namespace="default", name="t", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(config),
        inputs=inputs,
        folder=tmp_path,
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    arguments = [str(tmp_path / "plan.json"), str(zygote().pid)]
    ranks = zygote().start_ranks("tests.trainer.hanging_worker", [arguments], tmp_path)
    log = tmp_path / "rank-0.log"
    deadline = time.monotonic() + END_SECONDS
    while BEFORE not in log.read_text():
        zygote().listen(0.1)
        assert ranks[0].returncode is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
    ranks[0].send_signal(signal.SIGTERM)
    assert ends_of(ranks) == [75], log.read_text()
    outcome = read_outcome(tmp_path, 0)
    assert outcome is not None
    assert outcome.result.message.startswith("told to stop, and the training thread did not return from its call")
    assert "a_call_that_never_returns" in log.read_text()


def outcomes_of(folder: Path, event: str) -> list[WorkerOutcome]:
    """Run two ranks of which rank 1 hangs, and return their outcomes. Both end with exit code 75."""
    ranks = zygote().start_ranks("tests.trainer.hanging", [[str(folder), event]] * 2, folder)
    assert ends_of(ranks) == [75, 75]
    assert "a_call_that_never_returns" in (folder / "rank-1.log").read_text()
    outcomes = [outcome for rank in range(2) if (outcome := read_outcome(folder, rank)) is not None]
    assert len(outcomes) == 2
    return outcomes
