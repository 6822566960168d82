"""The intervals and tests of `finetune compare` are those of the papers, and are never wrong ways round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.compare.intervals import (
    FEWEST_FOR_NORMAL,
    Z,
    mcnemar,
    paired_difference,
    unpaired_difference,
    wilson,
)


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[float], list[float]]:
    """Return two lists of right and wrong answers with these numbers of rows."""
    table = ((1.0, 1.0, both), (1.0, 0.0, only_first), (0.0, 1.0, only_second), (0.0, 0.0, neither))
    rows = [(first, second) for first, second, count in table for _ in range(count)]
    return [first for first, _ in rows], [second for _, second in rows]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_that_of_newcombes_first_table(
    right: int, count: int, low: float, high: float
) -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    found = wilson(right / count, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_the_interval_of_unpaired_shares_is_that_of_newcombes_second_table(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    # Newcombe, "Interval estimation for the difference between independent proportions" (1998), table II, method 10.
    # The table has the first share minus the second.
    found = unpaired_difference(second[0] / second[1], second[1], first[0] / first[1], first[1]).interval
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


def test_the_interval_of_paired_shares_is_that_of_newcombes_example() -> None:
    # Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data"
    # (1998), table III, method 10: of 50 rows both are right in 36, only one of them in 12 and in 2.
    first, second = pairs(both=36, only_first=2, only_second=12, neither=0)
    found = paired_difference(first, second)
    assert found is not None
    assert found.paired
    assert (round(found.interval.low, 4), round(found.interval.high, 4)) == (0.0569, 0.3404)


def test_pairs_that_agree_make_the_interval_narrower_than_unpaired_rows_do() -> None:
    first, second = pairs(60, 5, 15, 20)
    paired = paired_difference(first, second)
    unpaired = unpaired_difference(0.65, 100, 0.75, 100)
    assert paired is not None
    assert paired.interval.value == pytest.approx(unpaired.interval.value)
    assert unpaired.interval.low < paired.interval.low < paired.interval.high < unpaired.interval.high


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.03125), (2, 10, 0.03857421875), (1, 8, 0.0390625)],
)
def test_the_exact_test_is_a_sign_test_of_the_rows_that_differ(
    only_first: int, only_second: int, p_value: float
) -> None:
    assert mcnemar(only_first, only_second) == p_value
    assert mcnemar(only_second, only_first) == p_value


def test_the_exact_test_does_not_overflow_with_many_rows() -> None:
    assert mcnemar(9000, 9000) == 1.0
    assert 0 <= mcnemar(2000, 10000) < 1e-300


def test_values_between_0_and_1_get_the_interval_of_their_mean_difference() -> None:
    first = [index % 5 / 10 for index in range(100)]
    second = [value + 0.1 + (index % 2) / 10 for index, value in enumerate(first)]
    found = paired_difference(first, second)
    assert found is not None
    half = Z * math.sqrt(0.0025 * 100 / 99) / 10
    assert found.interval.value == pytest.approx(0.15)
    assert found.interval.high - found.interval.low == pytest.approx(2 * half)
    assert found.p_value is None
    assert paired_difference(first[: FEWEST_FOR_NORMAL - 1], second[: FEWEST_FOR_NORMAL - 1]) is None
    assert paired_difference([], []) is None


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_interval_of_a_share_holds_the_share_and_stays_between_0_and_1(count: int, share: float) -> None:
    found = wilson(share, count)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=80))
def test_the_interval_of_pairs_holds_the_difference_and_changes_its_sign_with_the_order(
    rows: list[tuple[float, float]],
) -> None:
    first, second = [a for a, _ in rows], [b for _, b in rows]
    found, turned = paired_difference(first, second), paired_difference(second, first)
    assert found is not None
    assert turned is not None
    interval = found.interval
    assert -1 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.value == pytest.approx((sum(second) - sum(first)) / len(rows))
    assert turned.interval.low == pytest.approx(-interval.high)
    assert turned.interval.high == pytest.approx(-interval.low)
    assert found.p_value == turned.p_value
