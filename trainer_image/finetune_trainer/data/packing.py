"""Puts the examples of a global batch into sequences: best-fit-decreasing, or one example a sequence.

Pure functions of lengths, so that every rank finds the same sequences without a word. A global batch is packed
within itself: packed and padded runs take the same examples in the same step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return ``rows`` in bins of at most ``capacity`` tokens: the longest first, each into the fullest bin with room
    (Johnson 1973: at most 11/9 of the best number of bins, plus 4). No length may be above ``capacity``."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(room left, bin), sorted."""
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        length = int(lengths[row])
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(at)
        bins[chosen].append(row)
        bisect.insort(rooms, (room - length, chosen))
    return bins


def pack(rows: Sequence[int], lengths: Sequence[int], *, capacity: int, ranks: int) -> list[list[int]]:
    """Return ``rows`` in sequences of at most ``capacity`` tokens, as even over ``ranks`` as costs no extra time.

    The ranks compute a multiple of their number of sequences anyway, so the sequences are made as short as that
    many allow: the least capacity for which best fit needs no more.
    """
    if not rows:
        return []
    fewest = len(best_fit_decreasing(rows, lengths, capacity))
    allowed = -(-fewest // ranks) * ranks
    least, most = max(int(lengths[row]) for row in rows), capacity
    while least < most:
        middle = (least + most) // 2
        if len(best_fit_decreasing(rows, lengths, middle)) <= allowed:
            most = middle
        else:
            least = middle + 1
    return best_fit_decreasing(rows, lengths, most)
