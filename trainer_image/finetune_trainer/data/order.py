"""Determines which examples each optimizer step consumes, and which rank computes which of them. All functions are pure
functions of seed, step and sizes.

In this module, a row is an example. One row of a data file may have become several of these rows. The number of the
step alone determines the position in the data. So a resumed run continues with exactly the rows that were not consumed
yet, even with another number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

HASHED_AT_ONCE = 4096
"""How many digests are held as Python objects at a time."""


class Cursor(NamedTuple):
    """Position of a global batch in the data: its epoch, and its index in the epoch. Both are counted from 0."""

    epoch: int
    batch: int


def batches_per_epoch(rows: int, global_batch_size: int) -> int:
    """Return the number of global batches in an epoch. The last batch may be smaller, because no row is dropped."""
    return -(-rows // global_batch_size)


def cursor(step: int, *, rows: int, global_batch_size: int) -> Cursor:
    """Return the position in the data of the global batch that step ``step`` (counted from 1) consumes."""
    return Cursor(*divmod(step - 1, batches_per_epoch(rows, global_batch_size)))


@functools.lru_cache(maxsize=2)
def permutation(rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    """Return the order of the rows in an epoch, as row numbers. The array can't be written to."""
    return digest_order(rows, f"{seed}/{epoch}")


def digest_order(rows: int, name: str) -> npt.NDArray[np.intp]:
    """Return the numbers from 0 to ``rows`` - 1, sorted by the digest of (``name``, number), in an array that can't be
    written to.

    No library's random generator is used, so the order is the same on every platform and with every library version.
    The digests and the order are arrays of numbers and not lists of Python objects, which would take more memory on
    every rank.
    """
    halves = np.empty((2, rows), dtype=np.uint64)
    for start in range(0, rows, HASHED_AT_ONCE):
        numbers = range(start, min(start + HASHED_AT_ONCE, rows))
        digests = b"".join(hashlib.blake2b(f"{name}/{row}".encode(), digest_size=16).digest() for row in numbers)
        halves[:, start : numbers.stop] = np.frombuffer(digests, dtype=">u8").reshape(-1, 2).T
    # `lexsort` sorts by its last key, which is the first half of a digest here. Digests with equal first halves are
    # sorted by their second halves.
    order = np.lexsort((halves[1], halves[0]))
    order.flags.writeable = False
    return order


def global_batch(step: int, *, rows: int, global_batch_size: int, seed: int) -> tuple[int, ...]:
    """Return the numbers of the rows that step ``step`` (counted from 1) consumes on all ranks together."""
    epoch, batch = cursor(step, rows=rows, global_batch_size=global_batch_size)
    start = batch * global_batch_size
    return tuple(permutation(rows, seed=seed, epoch=epoch)[start : start + global_batch_size].tolist())


def micro_batches(
    sequences: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> list[list[Sequence[int]]]:
    """Return the micro-batches of rank ``rank``. Each micro-batch is a list of sequences, and each sequence is a list
    of row numbers. A sequence has several rows only if rows are packed.

    All ranks get the same number of micro-batches, so a rank without work left gets empty ones. The sequences are dealt
    to the ranks from the longest to the shortest, so that sequences that are computed together need little padding.
    This order does not change the loss of the global batch.
    """

    def length(sequence: Sequence[int]) -> int:
        return sum(int(lengths[row]) for row in sequence)

    dealt = sorted(sequences, key=lambda sequence: (-length(sequence), tuple(sequence)))[rank::world_size]
    largest_share = -(-len(sequences) // world_size)
    count = -(-largest_share // micro_batch_size)
    return [dealt[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]
