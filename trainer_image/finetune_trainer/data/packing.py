"""Packs the examples of a global batch into sequences by best-fit decreasing. `micro_batches.py` calls `pack`.

The functions depend only on the lengths, so all ranks compute the same sequences without communication. Each global
batch is packed by itself, so a packed run and a padded run consume the same examples in the same step.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return ``rows`` in bins of at most ``capacity`` tokens. The longest row comes first, and each row goes into the
    fullest bin that has room for it.

    Best-fit decreasing needs at most 11/9 of the smallest possible number of bins, plus 4 (Johnson 1973). No row may be
    longer than ``capacity``.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """Pairs of (free tokens, index of the bin), sorted."""
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
    """Return ``rows`` packed into sequences of at most ``capacity`` tokens, with lengths as even as possible.

    All ranks compute the same number of sequences, so up to the next multiple of ``ranks`` an additional sequence costs
    no time. The result uses the smallest capacity that needs no more sequences than that.
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
