"""Formats sizes, durations, measured values and one-line curves for people.

The functions are pure. The views of a job (`panel.py` and `log_lines.py`), the commands, `job_client.py` and the demo
call them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

LARGEST_DRAWN = 1e300
"""Largest magnitude of a value that a curve draws. Sums and differences of such values are finite."""

BARS = "▁▂▃▄▅▆▇█"
"""Characters of a one-line curve. The first character is for the lowest value, and the last is for the highest
value."""


def size(count: int) -> str:
    """Return ``count``, a number of bytes, in decimal units, for example `999 B` or `11.2 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number_of: int) -> str:
    """Return ``number_of``, a number of things, for example `6.74 B`, `135.09 M`, `2.50 K` or `42`. `B` stands for a
    billion."""
    if number_of < 1000:
        return str(number_of)
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if (value := round(number_of / scale, 2)) >= 1:
            return f"{value:.2f} {unit}"
    return f"{number_of / 1e3:.2f} K"


def duration(seconds: float) -> str:
    """Return ``seconds``, a time span, in at most two units, for example `42 s`, `1 min 05 s`, `3 h 20 min` or `2 d 4
    h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def age(seconds: float) -> str:
    """Return ``seconds``, the age of something, as short as kubectl does, for example `42s`, `5m`, `3h20m` or
    `2d4h`."""
    words = duration(seconds).replace(" min", "m").replace(" h", "h").replace(" d", "d").replace(" s", "s")
    first, *rest = words.split()
    second = rest[0].lstrip("0") if rest and seconds >= 3600 else ""
    return first + second if second[:1].isdigit() else first


def seconds_between(start: datetime, end: datetime) -> float:
    """Return the seconds from ``start`` to ``end``. A time without a zone counts as UTC, because the API server accepts
    such times in a status."""
    return (with_zone(end) - with_zone(start)).total_seconds()


def with_zone(time: datetime) -> datetime:
    """Return ``time``, in UTC where it has no zone."""
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def measured(value: str | float | None) -> float | None:
    """Return ``value``, a decimal of a status, as a number. Return None where it is absent, or is no finite number: the
    API server accepts any text there."""
    try:
        quantity = float(value) if value is not None else math.nan
    except (ValueError, OverflowError):
        return None
    return quantity if math.isfinite(quantity) else None


def number(value: str | float) -> str:
    """Return ``value``, a measured number, with at most four significant digits, for example `0.5723`, `1.004` or
    `242.7`. A value of 1000 or more is rounded to a whole number, for example `12345`. A text that is no number is
    returned as it is."""
    try:
        quantity = float(value)
    except (ValueError, OverflowError):
        return str(value)
    if not math.isfinite(quantity):
        return str(quantity)
    if abs(quantity) >= 1000:
        return f"{quantity:.0f}"
    return f"{quantity:.4g}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return ``values``, the oldest first, as a curve of at most ``width`` characters with the newest value at the
    right.

    The scale is logarithmic where all finite values are greater than zero, because a loss may fall by orders of
    magnitude. Where there are more than ``width`` values, they are divided into ``width`` parts of about equal length.
    Each part is drawn as one character, by the mean of its values or, on the logarithmic scale, of their logarithms. A
    part without a finite value leaves a gap.
    """
    values = [value if abs(value) <= LARGEST_DRAWN else math.nan for value in values]
    positive = _all_positive(values)
    heights = [math.log(value) if positive and math.isfinite(value) else value for value in values]
    stretches = [_stretch(heights, column, width) for column in range(min(width, len(heights)))]
    means = [sum(known) / len(known) if known else None for known in stretches]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else BARS[round((mean - low) * scale)] for mean in means)


def _all_positive(values: Sequence[float]) -> bool:
    """Return whether all finite values are greater than zero. A logarithmic scale can't show other values."""
    return all(value > 0 for value in values if math.isfinite(value))


def _stretch(values: Sequence[float], column: int, width: int) -> list[float]:
    """Return the finite values of the part of ``values`` that is drawn as character number ``column``, counted from 0,
    of a curve of at most ``width`` characters."""
    columns = min(width, len(values))
    start, end = column * len(values) // columns, (column + 1) * len(values) // columns
    return [value for value in values[start:end] if math.isfinite(value)]
