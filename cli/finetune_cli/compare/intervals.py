"""Confidence intervals and tests for scores. Pure; `figures.py` and the claims call these functions.

All intervals have the level `LEVEL` (95 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
"""Quantile of the standard normal distribution for a two-sided interval, 1.96."""
FEWEST_FOR_NORMAL = 30
"""Fewest paired values for which the mean difference is taken to be normally distributed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval. For a difference this means that the difference is shown."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two scores, the second minus the first."""

    interval: Interval
    paired: bool
    """Whether both were graded on the same rows, row by row."""
    rows: int
    """Number of rows that both were graded on, or the smaller number of graded rows where the rows are not paired."""
    p_value: float | None = None
    """Probability of a difference at least this large if both were equally good (exact McNemar test). None for
    unpaired rows and for scores that are not right or wrong."""


def wilson(share: float, count: int) -> Interval:
    """Return the score interval of a proportion ``share`` of ``count`` answers.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927),
    209-212. For a mean of values between 0 and 1 the interval is too wide rather than too narrow, because such values
    never vary more than right-or-wrong ones with the same mean.
    """
    if count < 1:
        raise ValueError("a proportion needs at least one answer")
    p, squared = min(1.0, max(0.0, share)), Z * Z / count
    centre = (p + squared / 2) / (1 + squared)
    half = Z / (1 + squared) * math.sqrt(p * (1 - p) / count + squared / (4 * count))
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def unpaired_difference(first: float, first_count: int, second: float, second_count: int) -> Difference:
    """Return the interval of ``second - first``, two proportions of different or unknown rows.

    Source: R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of
    eleven methods", Statistics in Medicine 17 (1998), 873-890, method 10, which joins the two Wilson intervals. Where
    both were graded on the same rows, the interval is too wide, because good and bad rows are the same for both.
    """
    a, b = wilson(first, first_count), wilson(second, second_count)
    value = b.value - a.value
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Difference(Interval(value, low, high), paired=False, rows=min(first_count, second_count))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Return the interval of the mean of ``second - first``, values of the same rows in the same order.

    Right-or-wrong values (0 and 1) get the interval of R. G. Newcombe, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", Statistics in Medicine 17 (1998), 2635-2650,
    method 10, and the exact test of Q. McNemar, Psychometrika 12 (1947), 153-157. Other values get the normal interval
    of their mean difference. None where there are no rows, or fewer than `FEWEST_FOR_NORMAL` with other values.
    """
    if len(first) != len(second):
        raise ValueError("paired values must come from the same rows")
    if not first:
        return None
    if set(first) | set(second) <= {0.0, 1.0}:
        return _paired_shares(first, second)
    if len(first) < FEWEST_FOR_NORMAL:
        return None
    differences = [b - a for a, b in zip(first, second, strict=True)]
    value = fmean(differences)
    half = Z * stdev(differences) / math.sqrt(len(differences))
    return Difference(Interval(value, value - half, value + half), paired=True, rows=len(first))


def _paired_shares(first: Sequence[float], second: Sequence[float]) -> Difference:
    count = len(first)
    pairs = list(zip(first, second, strict=True))
    both = sum(a == 1 and b == 1 for a, b in pairs)
    only_first = sum(a == 1 and b == 0 for a, b in pairs)
    only_second = sum(a == 0 and b == 1 for a, b in pairs)
    neither = count - both - only_first - only_second
    a, b = wilson((both + only_first) / count, count), wilson((both + only_second) / count, count)
    phi = _correlation(both, only_first, only_second, neither)
    value = b.value - a.value

    def spread(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = value - spread(b.value - b.low, a.high - a.value)
    high = value + spread(b.high - b.value, a.value - a.low)
    interval = Interval(value, max(-1.0, low), min(1.0, high))
    return Difference(interval, paired=True, rows=count, p_value=mcnemar(only_first, only_second))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Return Newcombe's corrected estimate of the correlation (phi) of paired proportions, 0 where it is not
    defined."""
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product == 0:
        return 0.0
    numerator = both * neither - only_first * only_second
    count = both + only_first + only_second + neither
    # The continuity correction of the paper's method 10: the numerator shrinks by n / 2 towards 0, and never passes it.
    corrected = max(numerator - count / 2, 0.0) if numerator > 0 else float(numerator)
    return corrected / math.sqrt(product)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test: the binomial test of ``only_first`` against
    ``only_second``, the numbers of rows that only one of the two answered right."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    if count == 0:
        return 1.0
    term = tail = 1
    for index in range(fewer):
        term = term * (count - index) // (index + 1)
        tail += term
    # Both numbers may be too large for a float, and their quotient is not.
    return min(1.0, 2 * tail / (1 << count))
