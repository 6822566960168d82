"""Which key of the work queue is taken next: namespaces take turns, and keys with news, such as a watch event or a
report, come before keys that only the resync has listed. While the next key of the resync has waited for longer than
RESYNC_PATIENCE_SECONDS, keys with news and keys of the resync take turns."""

from __future__ import annotations

import random

import pytest

from finetune_operator.queue.fair_order import RESYNC_PATIENCE_SECONDS
from finetune_operator.queue.key import Key
from finetune_operator.queue.work_queue import WorkQueue
from tests.operator.operators import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue(clock=clock, jitter=lambda: 0.0)


def keys(namespace: str, count: int) -> list[Key]:
    return [Key(namespace, f"job-{number}") for number in range(count)]


def taken(queue: WorkQueue, count: int) -> list[Key]:
    """Take up to ``count`` keys, and mark each one as done before the next one is taken; return the keys."""
    found: list[Key] = []
    while len(found) < count and (key := queue.pop()) is not None:
        found.append(key)
        queue.done(key)
    return found


def test_a_namespace_with_thousands_of_keys_delays_another_by_one_key(queue: WorkQueue) -> None:
    for key in keys("noisy", 5000):
        queue.add(key)
    taken(queue, 3)
    queue.add(Key("quiet", "job"))
    assert Key("quiet", "job") in taken(queue, 2)


def test_a_namespace_that_adds_its_keys_again_and_again_gets_one_turn_of_two(queue: WorkQueue) -> None:
    for key in [*keys("noisy", 100), *keys("quiet", 10)]:
        queue.add(key)
    found: list[str] = []
    for _ in range(20):
        first = queue.pop()
        assert first is not None
        found.append(first.namespace)
        if first.namespace == "noisy":
            queue.add(first)
        queue.done(first)
    assert found.count("quiet") == 10


@pytest.mark.parametrize("seed", range(10))
def test_no_key_waits_for_more_than_one_key_of_each_other_namespace_per_key_of_its_own(seed: int) -> None:
    chance = random.Random(seed)
    queue = WorkQueue(jitter=lambda: 0.0)
    namespaces = [f"team-{number}" for number in range(chance.randint(2, 6))]
    waiting = [key for namespace in namespaces for key in keys(namespace, chance.choice((1, 3, 300)))]
    chance.shuffle(waiting)
    for key in waiting:
        queue.add(key)
    ahead = {key: len([other for other in waiting[: waiting.index(key)] if other[0] == key[0]]) for key in waiting}
    for position, key in enumerate(taken(queue, len(waiting))):
        assert position < (ahead[key] + 1) * len(namespaces)


def test_keys_of_one_namespace_come_in_the_order_in_which_they_were_added(queue: WorkQueue) -> None:
    for key in keys("team", 50):
        queue.add(key)
    assert taken(queue, 50) == keys("team", 50)


def test_a_job_that_was_just_written_comes_before_the_other_jobs_of_its_namespace_only(queue: WorkQueue) -> None:
    for key in [*keys("team", 10), *keys("other", 10)]:
        queue.add(key)
    begun = queue.pop()
    assert begun == Key("team", "job-0")
    queue.add_again(begun)
    queue.done(begun)
    assert taken(queue, 2) == [Key("other", "job-0"), begun]


def test_what_is_new_goes_before_a_resync_of_thousands_of_jobs(queue: WorkQueue) -> None:
    for key in keys("team", 5000):
        queue.add_for_resync(key)
    taken(queue, 10)
    news = [Key("team", f"new-{number}") for number in range(100)]
    for key in news:
        queue.add(key)
    assert taken(queue, 100) == news


def test_news_about_a_job_of_the_resync_move_it_forward_and_it_is_taken_once(queue: WorkQueue) -> None:
    for key in keys("team", 100):
        queue.add_for_resync(key)
    moved = Key("team", "job-99")
    queue.add(moved)
    queue.add_for_resync(moved)
    assert len(queue) == 100
    found = taken(queue, 1000)
    assert (found[0], len(found), len(set(found))) == (moved, 100, 100)


def test_news_that_come_while_a_job_is_processed_are_not_taken_for_the_resync(queue: WorkQueue) -> None:
    for key in keys("team", 10):
        queue.add_for_resync(key)
    first = queue.pop()
    assert first is not None
    queue.add_for_resync(first)
    queue.add(first)
    queue.done(first)
    assert queue.pop() == first


def test_news_without_an_end_do_not_stop_the_resync(queue: WorkQueue, clock: Clock) -> None:
    old = keys("team", 5)
    for key in old:
        queue.add_for_resync(key)
    clock.now = RESYNC_PATIENCE_SECONDS + 1
    found: list[Key] = []
    for number in range(10):
        queue.add(Key("busy", f"new-{number}"))
        found += taken(queue, 1)
    assert [key for key in found if key.namespace == "team"] == old


def test_the_age_of_the_queue_is_that_of_its_oldest_key(queue: WorkQueue, clock: Clock) -> None:
    queue.add_for_resync(Key("team", "old"))
    clock.now = 5.0
    queue.add(Key("other", "new"))
    clock.now = 7.0
    assert queue.oldest_age() == 7.0
    taken(queue, 2)
    assert queue.oldest_age() == 0.0
