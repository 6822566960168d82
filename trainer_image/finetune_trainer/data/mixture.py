"""Determines which examples each optimizer step takes from several sources (`dataset.train.mix`). All functions are
pure functions of seed, step, sizes and weights, as in `order.py`, so a resumed run neither repeats nor loses an
example.

The examples of a mix have one endless order, by their times. The k-th example of source i, counted from k = 0, has the
time (k + 1/2) / weight(i). So the first n examples of the order hold the sources in their shares as exactly as whole
numbers can, for every n (the method of Webster and Sainte-Laguë, by which parliaments share out seats). Each source is
gone through again and again, each time in another order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from finetune_core.api.sources import MIX_LIMIT
from finetune_trainer.data.order import cursor, digest_order


@dataclass(frozen=True)
class Mixture:
    """The sources of a mix: how many examples each of them has, and its weight."""

    sizes: tuple[int, ...]
    """Number of examples of each source, in the order in which the examples are stored. Each number is at least 1."""
    weights: tuple[Fraction, ...]
    """Weights above 0. Only their ratios count."""

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[str | None]) -> Mixture:
        """Return the mixture of sources with ``sizes`` examples. A weight is a decimal number as text. Where a weight
        is None, the number of examples of the source is its weight. If all weights are None, each example comes once in
        an epoch."""
        return cls(
            tuple(sizes),
            tuple(Fraction(size if weight is None else weight) for size, weight in zip(sizes, weights, strict=True)),
        )

    @property
    def examples(self) -> int:
        """Number of examples of all sources together, which is also the number of examples of an epoch."""
        return sum(self.sizes)

    def counts(self, position: int) -> tuple[int, ...]:
        """Return how many of the first ``position`` examples of the order come from each source."""
        total = sum(self.weights)
        counts = [int(position * weight / total + Fraction(1, 2)) for weight in self.weights]
        # The sum of the rounded numbers differs from ``position`` by less than the number of sources, so these loops
        # repeat only a few times.
        while sum(counts) > position:
            counts[self._extreme([count - 1 if count else None for count in counts], last=True)] -= 1
        while sum(counts) < position:
            counts[self._extreme(counts, last=False)] += 1
        return tuple(counts)

    def _extreme(self, examples: Sequence[int | None], *, last: bool) -> int:
        """Return the index of the source whose example comes first in the order, or comes last if ``last`` is set.
        ``examples`` has the number of one example of each source, or None for a source that does not count. If two
        examples have equal times, the example of the earlier source comes first."""
        times = [
            (Fraction(2 * example + 1) / weight, source)
            for source, (example, weight) in enumerate(zip(examples, self.weights, strict=True))
            if example is not None
        ]
        return (max(times) if last else min(times))[1]

    def taken(self, step: int, *, global_batch_size: int) -> tuple[int, ...]:
        """Return how many examples the steps up to ``step`` have taken from each source. An example that was taken
        twice counts twice."""
        after = cursor(step + 1, rows=self.examples, global_batch_size=global_batch_size)
        return self.counts(after.epoch * self.examples + after.batch * global_batch_size)

    def global_batch(self, step: int, *, global_batch_size: int, seed: int) -> tuple[int, ...]:
        """Return the numbers of the examples that step ``step`` (counted from 1) consumes on all ranks together, source
        by source. An example can occur several times if its source has few examples."""
        epoch, batch = cursor(step, rows=self.examples, global_batch_size=global_batch_size)
        start = epoch * self.examples + batch * global_batch_size
        end = min(start + global_batch_size, (epoch + 1) * self.examples)
        first, rows = 0, []
        for source, (size, begin, stop) in enumerate(
            zip(self.sizes, self.counts(start), self.counts(end), strict=True)
        ):
            for number in range(begin, stop):
                turn, place = divmod(number, size)
                rows.append(first + int(source_order(size, seed=seed, source=source, turn=turn)[place]))
            first += size
        return tuple(rows)


def mix_digest(digest: str, sizes: Sequence[int]) -> str:
    """Return the sha256 of a mix with ``sizes`` examples of each source. ``digest`` is the sha256 of all examples of
    the mix together. ``digest`` alone does not determine which examples a step takes, because it does not tell at which
    example the next source begins."""
    return hashlib.sha256(f"{digest} {' '.join(map(str, sizes))}".encode()).hexdigest()


def source_order(size: int, *, seed: int, source: int, turn: int) -> npt.NDArray[np.intp]:
    """Return the order in which the examples of source number ``source`` are taken after the source was gone through
    ``turn`` times. The order is an array of shape (size,) with the numbers of the examples within the source."""
    known = _newest_orders(size, seed, source)
    if turn not in known:
        # At most two orders are kept, because an order may have millions of numbers, and a step rarely needs more.
        while len(known) > 1:
            known.pop(next(iter(known)))
        known[turn] = digest_order(size, f"{seed}/{source}/{turn}")
    return known[turn]


@functools.lru_cache(maxsize=MIX_LIMIT)
def _newest_orders(size: int, seed: int, source: int) -> dict[int, npt.NDArray[np.intp]]:
    """Return the dict in which `source_order` keeps the newest orders of a source, by their turns."""
    return {}
