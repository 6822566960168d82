"""Packs the examples of a global batch or of an evaluation set into few sequences, with the best-fit decreasing
algorithm. `micro_batches.py` calls `pack`.

The functions are pure, so all ranks compute the same sequences without communication. Each global batch is packed by
itself, so a step consumes the same examples with and without packing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put ``rows`` into bins of at most ``capacity`` tokens, and return the bins. The longest row comes first. Each row
    goes into the fullest bin that has room for it, or into a new bin if no bin has room. No row may be longer than
    ``capacity``.

    The result has at most 11/9 of the smallest possible number of bins, plus 4 (Johnson 1973).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """For each bin a pair (free tokens, index of the bin), sorted."""
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
    """Return ``rows`` packed into sequences of at most ``capacity`` tokens. The sequences are made shorter than
    ``capacity`` where this costs no time.

    The number of sequences that `best_fit_decreasing` needs is rounded up to a multiple of ``ranks``. The further
    sequences cost no time, because without them some ranks would have one sequence less and wait for the others. A
    binary search then looks for the smallest capacity with which `best_fit_decreasing` needs at most the rounded number
    of sequences.
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
