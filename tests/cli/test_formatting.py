"""The command line writes sizes, durations, numbers and loss curves in a form that people can read."""

from __future__ import annotations

import math

import pytest

from finetune_cli.formatting import count, duration, number, size, sparkline


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (11_234_567, "11.2 MB"), (269_060_552, "269 MB"), (5_100_000_000_000, "5.1 TB")],
)
def test_sizes_are_decimal_with_three_digits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("things", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (2_504, "2.50 K"),
        (999_999, "1.00 M"),
        (134_515_008, "134.52 M"),
        (6_738_415_616, "6.74 B"),
    ],
)
def test_counts_have_the_largest_unit_of_which_there_is_one(things: int, text: str) -> None:
    assert count(things) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (42.4, "42 s"),
        (65, "1 min 05 s"),
        (3599.6, "1 h 00 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [("0.57231", "0.5723"), ("1.00419", "1.004"), ("242.73", "242.7"), (12345.6, "12346"), ("NaN", "nan")],
)
def test_numbers_have_four_digits(value: str | float, text: str) -> None:
    assert number(value) == text


def test_a_curve_falls_from_high_to_low() -> None:
    assert sparkline([8.0, 4.0, 2.0, 1.0]) == "█▆▃▁"


def test_a_long_curve_is_thinned_to_its_width() -> None:
    curve = sparkline([1000.0 - step for step in range(999)], width=20)
    assert len(curve) == 20
    assert curve[0] == "█"
    assert curve[-1] == "▁"


def test_a_curve_leaves_a_gap_for_what_is_not_finite() -> None:
    assert sparkline([2.0, math.nan, 1.0]) == "█ ▁"


def test_a_curve_without_finite_values_is_empty() -> None:
    assert sparkline([math.nan, math.inf]) == ""
    assert sparkline([]) == ""


def test_a_flat_curve_is_drawn() -> None:
    assert sparkline([1.0, 1.0]) == "▁▁"
