"""Usage is counted from the pods' own times, so it does not depend on how often the operator reconciles a job."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_core.api.status import UsageStatus
from finetune_operator.objects.observations import ContainerObservation, ContainerState, PodObservation
from finetune_operator.observe.usage import usage_until
from tests.operator.builders import at, pod


def holding(
    index: int, *, scheduled: float | None, started: float | None = None, ended: float | None = None, **changes: Any
) -> PodObservation:
    """Return a pod that was scheduled, started and ended at the given seconds after `NOW`.

    None means that the pod was not yet scheduled, started or ended.
    """
    state = ContainerState.TERMINATED if ended is not None else ContainerState.RUNNING
    container = ContainerObservation(
        state=state if started is not None else ContainerState.WAITING,
        started_at=None if started is None else at(started),
        finished_at=None if ended is None else at(ended),
        exit_code=None if ended is None else 0,
    )
    scheduled_at = None if scheduled is None else at(scheduled)
    return pod(index, **({"scheduled_at": scheduled_at, "container": container} | changes))


def count(pods: list[PodObservation], times: list[float], gpus: int = 4) -> tuple[int, int]:
    usage: UsageStatus | None = None
    for now in times:
        usage = usage_until(at(now), usage, pods, gpus=gpus)
    assert usage is not None
    return usage.gpu_seconds, usage.active_seconds


@pytest.mark.parametrize("times", [[100], [20, 100], [*range(0, 101, 7), 100], [100, 200]])
def test_it_does_not_matter_when_the_operator_reconciles(times: list[float]) -> None:
    # of each pod: index, and the seconds at which it was scheduled, started and ended
    lives = [(0, 0, 10, 90), (1, 5, 20, 95)]
    usage: UsageStatus | None = None
    for now in times:
        seen = [
            holding(index, scheduled=scheduled, started=started, ended=ended if ended <= now else None)
            for index, scheduled, started, ended in lives
            if scheduled <= now
        ]
        usage = usage_until(at(now), usage, seen, gpus=4)
    assert usage is not None
    assert (usage.gpu_seconds, usage.active_seconds) == (4 * (90 + 90), 85)


def test_a_pod_without_a_node_takes_nothing_and_one_that_waits_for_its_image_takes_gpus_only() -> None:
    assert count([holding(0, scheduled=None)], [50]) == (0, 0)
    assert count([holding(0, scheduled=10)], [50]) == (4 * 40, 0)


def test_time_that_two_pods_share_is_active_once_and_a_gap_is_not() -> None:
    pods = [
        holding(0, scheduled=0, started=0, ended=10),
        holding(1, scheduled=0, started=5, ended=15),
        holding(2, scheduled=40, started=40, ended=50),
    ]
    assert count(pods, [100], gpus=1) == (10 + 15 + 10, 25)


def test_a_pod_that_vanished_between_two_reconciles_held_its_gpus_until_the_second() -> None:
    first = usage_until(at(30), None, [holding(0, scheduled=0, started=0)], gpus=2)
    assert first.holders == ["pod-0"]
    gone = usage_until(at(40), first, [], gpus=2)
    assert (gone.gpu_seconds, gone.active_seconds, gone.holders) == (2 * 40, 40, [])
    assert usage_until(at(400), gone, [], gpus=2).gpu_seconds == 2 * 40


def test_a_pod_that_vanished_before_it_ran_was_not_active() -> None:
    first = usage_until(at(30), None, [holding(0, scheduled=0)], gpus=2)
    gone = usage_until(at(40), first, [], gpus=2)
    assert (gone.gpu_seconds, gone.active_seconds) == (2 * 40, 0)


def test_a_dead_kubelets_pod_counts_to_the_end_of_its_grace_period() -> None:
    stuck = holding(0, scheduled=0, started=0, delete_requested_at=at(10), delete_deadline=at(100))
    assert count([stuck], [50, 400, 5000]) == (4 * 100, 100)


def test_suspended_time_is_not_counted() -> None:
    before = usage_until(at(60), None, [holding(0, scheduled=0, started=0)], gpus=1)
    ended = usage_until(at(71), before, [holding(0, scheduled=0, started=0, ended=70)], gpus=1)
    suspended = usage_until(at(5000), ended, [], gpus=1)
    assert (suspended.gpu_seconds, suspended.active_seconds) == (70, 70)


def test_cpu_jobs_take_no_gpu_seconds() -> None:
    assert count([holding(0, scheduled=0, started=0, ended=20)], [30], gpus=0) == (0, 20)


def test_a_container_that_its_runtime_could_not_start_has_not_run_since_1970() -> None:
    ended = pod(0, exit_code=128, reason="StartError", finished=30, scheduled_at=at(0))
    assert ended.container is not None
    unstarted = replace(ended.container, started_at=datetime.fromtimestamp(0, UTC))
    assert count([replace(ended, container=unstarted)], [40, 80]) == (4 * 30, 0)


def test_an_end_by_a_clock_that_is_ahead_is_counted_once() -> None:
    early = holding(0, scheduled=30, started=31, ended=130)
    assert count([early], [*range(100, 140, 5)], gpus=8) == (8 * 100, 99)


def test_a_leader_whose_clock_is_behind_counts_no_time_twice() -> None:
    running = [holding(0, scheduled=0, started=0)]
    ahead = usage_until(at(600), None, running, gpus=8)
    behind = usage_until(at(481), ahead, running, gpus=8)
    assert (behind.last_update_time, behind.gpu_seconds) == (at(600), 8 * 600)
    later = usage_until(at(700), behind, running, gpus=8)
    assert (later.last_update_time, later.gpu_seconds, later.active_seconds) == (at(700), 8 * 700, 700)


@pytest.mark.parametrize("seed", range(50))
def test_usage_never_goes_back_and_never_exceeds_the_time_that_passed(seed: int) -> None:
    """The leader changes by chance, and the clocks of leaders and nodes are wrong by up to two minutes."""
    chance = random.Random(seed)
    leaders = [chance.uniform(-120, 120) for _ in range(3)]
    lives = [(start, start + chance.uniform(10, 900)) for start in (chance.uniform(0, 900) for _ in range(4))]
    skews = [chance.uniform(-120, 120) for _ in lives]
    usage: UsageStatus | None = None
    times = sorted(chance.uniform(0, 2000) for _ in range(60))
    for true in times:
        seen = [
            holding(
                index,
                scheduled=max(start, 0),
                started=start + skew,
                ended=end + skew if end <= true else None,
            )
            for index, ((start, end), skew) in enumerate(zip(lives, skews, strict=True))
            if start <= true
        ]
        before = usage or UsageStatus(last_update_time=at(-1000))
        usage = usage_until(at(int(true + chance.choice(leaders))), usage, seen, gpus=2)
        assert usage.gpu_seconds >= before.gpu_seconds
        assert usage.active_seconds >= before.active_seconds
        assert usage.last_update_time is not None
        assert before.last_update_time is not None
        assert usage.last_update_time >= before.last_update_time
    assert usage is not None
    # A wrong clock moves a start and an end by two minutes at most, and so does the clock of a leader.
    held = sum(end - start + 4 * 120 for start, end in lives)
    assert usage.gpu_seconds <= 2 * held
    assert usage.active_seconds <= times[-1] + 2 * 120


def test_a_start_by_a_clock_that_is_behind_is_no_earlier_than_the_pod() -> None:
    """A queue held the job for hours, and the status was not written meanwhile. So only the times at which the pod was
    created and scheduled show that its container can't have started as early as the node's clock says."""
    waited = usage_until(at(0), None, [], gpus=8)
    late = holding(0, scheduled=7200, started=3600, created_at=at(7190))
    assert usage_until(at(7260), waited, [late], gpus=8).active_seconds == 60
    unbound = holding(0, scheduled=None, started=3600, created_at=at(7190))
    assert usage_until(at(7260), waited, [unbound], gpus=8).active_seconds == 70
