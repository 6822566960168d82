"""The loss curve of a report. A report has room for few points, so `progress.py` calls `downsample` to choose them."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.contract import CurvePoint

MAX_POINTS = 60
"""Largest number of points of the loss curve in one report."""


def downsample(points: Sequence[CurvePoint], limit: int = MAX_POINTS) -> list[CurvePoint]:
    """Return at most ``limit`` of ``points``: the first, the last, an even choice of the points with an evaluation, and
    an even choice of the rest.

    Points with an evaluation are rare and important, so they are chosen first, up to half of the ``limit``. The rest is
    all other points, including the points with an evaluation for which that half had no room.
    """
    if len(points) <= limit:
        return list(points)
    scored = [index for index, point in enumerate(points) if point.perplexity is not None]
    chosen = {0, len(points) - 1, *_even(scored, limit // 2)}
    rest = [index for index in range(len(points)) if index not in chosen]
    chosen |= set(_even(rest, limit - len(chosen)))
    return [points[index] for index in sorted(chosen)]


def _even(items: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of ``items`` at even distances, always with the last item. Return all items where there are at
    most ``count``."""
    if len(items) <= count:
        return list(items)
    return [items[(index + 1) * len(items) // count - 1] for index in range(count)]
