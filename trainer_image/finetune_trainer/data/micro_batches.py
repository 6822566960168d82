"""Which micro-batches each rank computes, of a training step or of an evaluation set, and their tensors.

`loop.py` plans one global batch for each optimizer step, and `evaluation/` plans whole example sets. Every rank gets
the same number of micro-batches, because ZeRO's collectives need equally many forward passes on every rank. A rank
that has fewer rows fills up with empty micro-batches.
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
class MicroBatchPlan:
    """The micro-batches that one rank computes of a set of rows, such as a global batch."""

    rows: Sequence[int]
    """Indices of all rows, those of the other ranks included."""
    tokens: int
    """Number of supervised tokens in all rows, those of the other ranks included."""
    micro_batches: Sequence[Sequence[Sequence[int]]]
    """This rank's micro-batches: each is a list of sequences, and each sequence a list of row indices. Every rank has
    the same number of micro-batches, some of which may be empty."""


@dataclass(frozen=True)
class MicroBatcher:
    """Makes the micro-batches of ``examples`` for one of ``world_size`` ranks."""

    examples: ExampleSet
    rank: int
    world_size: int
    pad: int
    """Token id that fills short sequences."""
    capacity: int | None
    """Most tokens of a packed sequence. None means that each sequence holds one example."""
    seed: int = 0

    def plan_step(self, step: int, optimization: OptimizationConfig) -> MicroBatchPlan:
        """Return this rank's part of the global batch of ``step``, which counts from 1."""
        rows = global_batch(
            step,
            rows=len(self.examples),
            global_batch_size=optimization.global_batch_size,
            seed=optimization.seed,
        )
        return self.plan_rows(rows, optimization.micro_batch_size)

    def plan_rows(self, rows: Sequence[int], micro_batch_size: int) -> MicroBatchPlan:
        """Return this rank's part of ``rows``, in micro-batches of at most ``micro_batch_size`` sequences."""
        lengths = self.examples.lengths
        sequences: Sequence[Sequence[int]] = (
            [[row] for row in rows]
            if self.capacity is None
            # Only rows that are never trained on can be longer than the capacity, such as those of the base model with
            # `evaluation.basePrompt`.
            else pack(
                rows, lengths, capacity=max(self.capacity, *(lengths[row] for row in rows), 1), ranks=self.world_size
            )
        )
        own = micro_batches(
            sequences, lengths, rank=self.rank, world_size=self.world_size, micro_batch_size=micro_batch_size
        )
        return MicroBatchPlan(rows, sum(self.examples[row].supervised_tokens for row in rows), own)

    def tensors(self, plan: MicroBatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yield the tensors of each micro-batch of ``plan``. Dropout depends on (seed, ``step``, row) only."""
        for micro_batch in plan.micro_batches:
            sequences = [
                [(self.examples[row], dropout_seed(self.seed, step, row)) for row in sequence]
                for sequence in micro_batch
            ]
            yield collate(sequences, pad=self.pad, packed=self.capacity is not None)
