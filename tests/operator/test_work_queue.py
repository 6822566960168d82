"""Tests of the work queue: deduplication, delays, back-off, and the removal of deleted jobs."""

from __future__ import annotations

import asyncio

import pytest

from finetune_operator.queue.key import Key
from finetune_operator.queue.work_queue import WorkQueue, backoff_seconds
from tests.operator.operators import Clock

A, B = Key("team", "a"), Key("team", "b")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue(clock=clock, jitter=lambda: 0.0)


def test_a_key_added_a_hundred_times_is_processed_once(queue: WorkQueue) -> None:
    for _ in range(100):
        queue.add(A)
    assert (queue.pop(), queue.pop()) == (A, None)


def test_a_key_added_while_it_is_processed_is_queued_again_after_done(queue: WorkQueue) -> None:
    queue.add(A)
    assert queue.pop() == A
    queue.add(A)
    assert queue.pop() is None
    queue.done(A)
    assert queue.pop() == A


def test_keys_come_in_the_order_of_their_first_addition(queue: WorkQueue) -> None:
    for key in (A, B, A):
        queue.add(key)
    assert [queue.pop(), queue.pop()] == [A, B]


def test_the_earlier_of_two_times_counts(queue: WorkQueue, clock: Clock) -> None:
    queue.add_after(A, 10)
    queue.add_after(A, 5)
    queue.add_after(A, 20)
    clock.now = 4.9
    assert queue.pop() is None
    clock.now = 5
    assert queue.pop() == A
    queue.done(A)
    clock.now = 30
    assert queue.pop() is None


def test_failures_back_off_and_a_success_resets(queue: WorkQueue) -> None:
    delays = [queue.add_rate_limited(A) for _ in range(4)]
    assert delays == [0.2, 0.4, 0.8, 1.6]
    queue.forget(A)
    assert queue.add_rate_limited(A) == 0.2


def test_back_off_is_bounded_and_jitter_only_shortens_it() -> None:
    assert backoff_seconds(1000, jitter=0) == 300
    assert backoff_seconds(1000, jitter=1) == 225
    assert backoff_seconds(1, jitter=0, base=10) == 10


def test_a_dropped_key_leaves_nothing_behind(queue: WorkQueue, clock: Clock) -> None:
    queue.add_rate_limited(A)
    queue.discard(A)
    clock.now = 1000
    assert queue.pop() is None
    assert len(queue._due) == 0


async def test_waiting_workers_share_the_keys() -> None:
    queue = WorkQueue()
    workers = [asyncio.ensure_future(queue.get()) for _ in range(2)]
    await asyncio.sleep(0)
    queue.add(A)
    queue.add_after(B, 0.01)
    async with asyncio.timeout(5):
        assert set(await asyncio.gather(*workers)) == {A, B}
