"""Which examples each step consumes and which rank computes which: pure functions of seed, step and sizes.

The position in the data is the step alone, so a resumed run, also on another number of ranks, takes up exactly the
rows that were not seen.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class Cursor(NamedTuple):
    """Where a global batch lies: epoch and index in it, both from 0."""

    epoch: int
    batch: int


def batches_per_epoch(rows: int, global_batch_size: int) -> int:
    """Return the global batches of an epoch; the last one may be smaller, none is dropped."""
    return -(-rows // global_batch_size)


def cursor(step: int, *, rows: int, global_batch_size: int) -> Cursor:
    """Return the position of the batch that step ``step`` (from 1) consumes."""
    return Cursor(*divmod(step - 1, batches_per_epoch(rows, global_batch_size)))


@functools.lru_cache(maxsize=2)
def permutation(rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of rows in an epoch.

    Sorted by a digest of (seed, epoch, row): the same on every platform and in every version of every library.
    """

    def key(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{row}".encode(), digest_size=16).digest()

    return tuple(sorted(range(rows), key=key))


def global_batch(step: int, *, rows: int, global_batch_size: int, seed: int) -> tuple[int, ...]:
    """Return the rows that step ``step`` (from 1) consumes, over all ranks."""
    epoch, batch = cursor(step, rows=rows, global_batch_size=global_batch_size)
    start = batch * global_batch_size
    return permutation(rows, seed=seed, epoch=epoch)[start : start + global_batch_size]


def micro_batches(
    sequences: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> list[list[Sequence[int]]]:
    """Return the micro-batches of ``rank``: lists of sequences, each of one row or several packed ones; empty lists
    where a rank has nothing left to compute.

    All ranks get the same number of them. Sequences are dealt by falling length, so that those computed together
    are about equally long; their order inside a global batch does not change its loss.
    """

    def length(sequence: Sequence[int]) -> int:
        return sum(int(lengths[row]) for row in sequence)

    dealt = sorted(sequences, key=lambda sequence: (-length(sequence), tuple(sequence)))[rank::world_size]
    largest_share = -(-len(sequences) // world_size)
    count = -(-largest_share // micro_batch_size)
    return [dealt[index * micro_batch_size : (index + 1) * micro_batch_size] for index in range(count)]
