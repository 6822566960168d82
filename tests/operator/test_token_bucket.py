"""A token bucket lets a burst through, and then one action after another at its rate. The tests set the clock."""

from __future__ import annotations

from finetune_operator.queue.token_bucket import TokenBucket


def test_a_bucket_lets_a_burst_through_and_then_gives_turns_at_its_rate() -> None:
    bucket = TokenBucket(per_second=2, burst=3)
    assert [bucket.reserve(0) for _ in range(5)] == [0, 0, 0, 0.5, 1.0]
    assert [bucket.reserve(60) for _ in range(4)] == [60, 60, 60, 60.5], "it holds no more than a burst"


def test_actions_that_do_not_wait_make_others_wait_longer_but_not_for_ever() -> None:
    bucket = TokenBucket(per_second=1, burst=2)
    for _ in range(1000):
        bucket.spend(0)
    assert bucket.reserve(0) == 3


def test_an_empty_bucket_gives_nothing_to_a_caller_that_does_not_wait() -> None:
    bucket = TokenBucket(per_second=0.5, burst=1)
    assert [bucket.take(0), bucket.take(1.9), bucket.take(2), bucket.take(2)] == [True, False, True, False]


def test_a_clock_that_goes_back_fills_nothing() -> None:
    bucket = TokenBucket(per_second=1, burst=1)
    assert bucket.take(100)
    assert not bucket.take(50)
    assert not bucket.take(100)
    assert bucket.take(101)
