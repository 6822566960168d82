"""The micro-batches of this rank, for a training step and for an evaluation: which rows, in which sequences, as which
tensors. All ranks make equally many, dummies of weight 0 included, because ZeRO's collectives need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch, collate, dropout_seed
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.order import global_batch, micro_batches
from finetune_trainer.data.packing import pack


@dataclass(frozen=True)
class Share:
    """What this rank computes of a set of rows."""

    rows: Sequence[int]
    """All rows, over all ranks."""
    tokens: int
    """Supervised tokens of all rows."""
    own: Sequence[Sequence[Sequence[int]]]
    """This rank's micro-batches of sequences of rows; equally many on every rank, empty ones are dummies."""


@dataclass(frozen=True)
class Batches:
    """Makes micro-batches of ``examples`` for one of ``world_size`` ranks."""

    examples: ExampleSet
    rank: int
    world_size: int
    pad: int
    capacity: int | None
    """Most tokens of a packed sequence; None: one example a sequence."""
    seed: int = 0

    def step(self, step: int, optimization: OptimizationConfig) -> Share:
        """Return this rank's share of the global batch that ``step`` (from 1) consumes."""
        rows = global_batch(
            step,
            rows=len(self.examples),
            global_batch_size=optimization.global_batch_size,
            seed=optimization.seed,
        )
        return self.share(rows, optimization.micro_batch_size)

    def share(self, rows: Sequence[int], micro_batch_size: int) -> Share:
        """Return this rank's share of ``rows``: its micro-batches of ``micro_batch_size`` sequences."""
        lengths = self.examples.lengths
        sequences: Sequence[Sequence[int]] = (
            [[row] for row in rows]
            if self.capacity is None
            # Rows that only the base model is asked may be longer than those that are trained on.
            else pack(
                rows, lengths, capacity=max(self.capacity, *(lengths[row] for row in rows), 1), ranks=self.world_size
            )
        )
        own = micro_batches(
            sequences, lengths, rank=self.rank, world_size=self.world_size, micro_batch_size=micro_batch_size
        )
        return Share(rows, sum(self.examples[row].supervised_tokens for row in rows), own)

    def tensors(self, share: Share, *, step: int = 0) -> Iterator[Batch]:
        """Return the tensors of this rank's micro-batches; dropout follows from (seed, ``step``, row)."""
        for micro in share.own:
            sequences = [
                [(self.examples[row], dropout_seed(self.seed, step, row)) for row in sequence] for sequence in micro
            ]
            yield collate(sequences, pad=self.pad, packed=self.capacity is not None)
