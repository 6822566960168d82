"""Curve."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.contract import CurvePoint

MOST_POINTS = 60


def thin(points: Sequence[CurvePoint], limit: int = MOST_POINTS) -> list[CurvePoint]:
    """Return at most ``limit`` points: first, last, the newest evaluations, and an even choice of the others.

    Evaluations are rare and worth more; they get at most half of the room.
    """
    if len(points) <= limit:
        return list(points)
    scored = [index for index, point in enumerate(points) if point.perplexity is not None]
    chosen = {0, len(points) - 1, *_even(scored, limit // 2)}
    rest = [index for index in range(len(points)) if index not in chosen]
    chosen |= set(_even(rest, limit - len(chosen)))
    return [points[index] for index in sorted(chosen)]


def _even(items: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of ``items`` in even distances with the last one among them, all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(index + 1) * len(items) // count - 1] for index in range(count)]
