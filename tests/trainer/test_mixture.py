"""The steps of a mix take examples from the sources in their shares. Which examples a step takes depends only on the
seed, the step, and the sizes and weights of the sources."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.examples import Example, example_set
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.data.mixture import Mixture, mix_digest
from finetune_trainer.data.order import batches_per_epoch, digest_order

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=5)
WEIGHTS = st.lists(st.sampled_from(["1", "2", "0.5", "10", "0.01", "3.75"]), min_size=5, max_size=5)


@given(SIZES, WEIGHTS, st.integers(0, 400))
def test_every_part_of_the_order_holds_the_sources_in_their_shares(
    sizes: list[int], weights: list[str], position: int
) -> None:
    mixture = Mixture.of(sizes, weights[: len(sizes)])
    before, after = mixture.counts(position), mixture.counts(position + 1)
    assert sum(before) == position
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(sizes) - 1) + [1]
    total = sum(mixture.weights)
    for count, weight in zip(before, mixture.weights, strict=True):
        assert abs(count - position * weight / total) < len(sizes)


def test_the_order_of_the_sources_is_that_of_their_times() -> None:
    mixture = Mixture((9, 9, 9), (Fraction(3), Fraction(2), Fraction(1)))
    times = sorted(
        (Fraction(2 * number + 1) / weight, source)
        for source, weight in enumerate(mixture.weights)
        for number in range(9)
    )
    for position in range(12):
        assert mixture.counts(position) == tuple(sum(source == s for _, source in times[:position]) for s in range(3))


@given(SIZES, WEIGHTS, st.integers(1, 40), st.integers(0, 99))
def test_an_epoch_takes_as_many_examples_as_there_are_and_each_comes_again_only_after_all_others(
    sizes: list[int], weights: list[str], size: int, seed: int
) -> None:
    mixture = Mixture.of(sizes, weights[: len(sizes)])
    per_epoch = batches_per_epoch(mixture.examples, size)
    first = [sum(sizes[:source]) for source in range(len(sizes))]
    seen: Counter[int] = Counter()
    for epoch in range(2):
        steps = range(1 + epoch * per_epoch, 1 + (epoch + 1) * per_epoch)
        batches = [mixture.global_batch(step, global_batch_size=size, seed=seed) for step in steps]
        assert [len(batch) for batch in batches[:-1]] == [size] * (per_epoch - 1)
        assert sum(map(len, batches)) == mixture.examples
        assert mixture.taken(steps[-1], global_batch_size=size) == mixture.counts((epoch + 1) * mixture.examples)
        seen.update(row for batch in batches for row in batch)
        for start, rows in zip(first, sizes, strict=True):
            times = [seen[row] for row in range(start, start + rows)]
            assert max(times) - min(times) <= 1


@given(SIZES, st.integers(1, 40), st.integers(0, 99))
def test_without_weights_an_epoch_takes_every_example_once(sizes: list[int], size: int, seed: int) -> None:
    mixture = Mixture.of(sizes, [None] * len(sizes))
    steps = range(1, 1 + batches_per_epoch(mixture.examples, size))
    taken = [row for step in steps for row in mixture.global_batch(step, global_batch_size=size, seed=seed)]
    assert sorted(taken) == list(range(mixture.examples))


def test_an_example_that_moves_to_another_source_changes_the_identity_of_the_data() -> None:
    assert mix_digest("0", [3, 5]) == mix_digest("0", [3, 5])
    assert len({mix_digest("0", [3, 5]), mix_digest("0", [4, 4]), mix_digest("0", [35]), mix_digest("1", [3, 5])}) == 4
    by_first, by_second = (Mixture.of(sizes, ["1", "1"]) for sizes in ([3, 5], [4, 4]))
    assert by_first.global_batch(1, global_batch_size=4, seed=1) != by_second.global_batch(
        1, global_batch_size=4, seed=1
    )


def test_the_order_of_a_mix_is_fixed_for_ever() -> None:
    mixture = Mixture.of([4, 4], ["3", "1"])
    batches = [mixture.global_batch(step, global_batch_size=4, seed=42) for step in (1, 2, 3)]
    assert batches == [(3, 1, 2, 6), (0, 0, 2, 4), (1, 3, 0, 7)]


@given(st.integers(0, 300), st.text(st.characters(codec="ascii"), max_size=5))
def test_an_order_is_that_of_the_digests(rows: int, name: str) -> None:
    def key(row: int) -> bytes:
        return hashlib.blake2b(f"{name}/{row}".encode(), digest_size=16).digest()

    assert digest_order(rows, name).tolist() == sorted(range(rows), key=key)


def test_the_order_of_a_million_rows_takes_few_bytes_a_row() -> None:
    """Every rank has the order in memory, and a file of 20 GB may have a hundred million rows."""
    tracemalloc.start()
    try:
        order = digest_order(1_000_000, "42/0")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert order.nbytes == 8_000_000
    assert peak <= 60_000_000


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_resume_on_another_number_of_ranks_takes_the_same_examples_of_a_mix(capacity: int | None) -> None:
    """A run that resumes after step 5 on four ranks takes the same examples in the same steps as a run without a break,
    also where the examples of a small source come again."""
    examples = example_set([Example(tuple(range(2 + row % 7)), ((1, 2 + row % 7),)) for row in range(23)])
    mixture = Mixture.of([20, 3], ["1", "1"])
    optimization = OptimizationConfig(
        learning_rate=1, global_batch_size=6, micro_batch_size=2, schedule="Constant", warmup_steps=0, weight_decay=0,
        gradient_clipping=1, precision="fp32", gradient_checkpointing=False, seed=7, zero_stage=1,
    )  # fmt: skip

    def consumed(steps: range, world: int) -> list[list[int]]:
        found = []
        for step in steps:
            shares = [
                MicroBatcher(
                    examples, rank=rank, world_size=world, pad=1, capacity=capacity, mixture=mixture
                ).plan_step(step, optimization)
                for rank in range(world)
            ]
            assert len({len(share.micro_batches) for share in shares}) == 1
            found.append(
                sorted(row for share in shares for micro in share.micro_batches for rows in micro for row in rows)
            )
        return found

    single = consumed(range(1, 9), 1)
    assert consumed(range(1, 6), 2) + consumed(range(6, 9), 4) == single
    assert [len(batch) for batch in single] == [6, 6, 6, 5, 6, 6, 6, 5]
    assert [sum(row >= 20 for row in batch) for batch in single] == [3, 3, 3, 2, 3, 3, 3, 3]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(st.sampled_from(["1", "0.5", "7", "9999999999999999", "0.00000000000001"]), min_size=8, max_size=8),
    st.integers(1, 20),
    st.integers(0, 10**9),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=60)
def test_whatever_worlds_a_run_has_and_wherever_it_stops_it_takes_the_examples_of_a_run_without_a_break(
    sizes: list[int], weights: list[str], size: int, seed: int, runs: list[tuple[int, int, int]], packed: bool
) -> None:
    """Each item of ``runs`` is a number of steps, a number of ranks, and a number of sequences in a micro-batch.
    Weights may differ by 30 orders of magnitude, and a source may have a single row."""
    mixture = Mixture.of(sizes, weights[: len(sizes)])
    rows = [Example(tuple(range(2 + row % 5)), ((1, 2 + row % 5),)) for row in range(mixture.examples)]
    examples, capacity = example_set(rows), 9 if packed else None
    done = 0
    for steps, world, micro_batch_size in runs:
        first, done = done + 1, done + steps
        for step in range(first, done + 1):
            batch = mixture.global_batch(step, global_batch_size=size, seed=seed)
            plans = [
                MicroBatcher(examples, rank=rank, world_size=world, pad=1, capacity=capacity).plan_rows(
                    batch, micro_batch_size
                )
                for rank in range(world)
            ]
            computed = [row for plan in plans for micro in plan.micro_batches for rows in micro for row in rows]
            assert Counter(computed) == Counter(batch)
            sources = [bisect.bisect(list(itertools.accumulate(sizes)), row) for row in batch]
            before = mixture.taken(step - 1, global_batch_size=size)
            counted = tuple(before[source] + sources.count(source) for source in range(len(sizes)))
            assert counted == mixture.taken(step, global_batch_size=size)
