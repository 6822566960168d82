"""Determines which examples each optimizer step consumes, and which rank computes which of them. All functions are pure
functions of seed, step and sizes.

A row means an example here: a conversation may have become several (`formats.py`). The number of the step alone
determines the position in the data. So a resumed run continues with exactly the rows that were not consumed yet, even
with another number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_DIGESTS_AT_ONCE = 1 << 16
"""How many digests are Python objects at once."""


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
def permutation(rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of the rows in an epoch, as row numbers in an array of shape (rows,)."""
    return digest_order(rows, f"{seed}/{epoch}")


def digest_order(rows: int, name: str) -> npt.NDArray[np.int64]:
    """Return the numbers from 0 to ``rows`` - 1, sorted by a digest of ``name`` and the number, as an array of shape
    (rows,).

    No library's random generator is used, so the order is the same on every platform and with every library version.
    The digests and the order are arrays, because every rank holds them, and Python's own objects would take more than
    100 bytes a row.
    """
    digests = np.empty((rows, 2), dtype=np.uint64)
    for start in range(0, rows, _DIGESTS_AT_ONCE):
        part = range(start, min(start + _DIGESTS_AT_ONCE, rows))
        joined = b"".join(hashlib.blake2b(f"{name}/{row}".encode(), digest_size=16).digest() for row in part)
        # As two numbers whose most significant byte comes first, digests compare like their bytes.
        digests[part.start : part.stop] = np.frombuffer(joined, dtype=">u8").reshape(-1, 2)
    return np.lexsort((digests[:, 1], digests[:, 0]))


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
