"""Plans which micro-batches each rank computes of a training step or of an evaluation set, and makes their tensors.

`loop.py` plans one global batch for each optimizer step, and `evaluation/` plans whole example sets. Every rank gets
the same number of micro-batches, because under ZeRO every rank must run equally many forward passes. A rank whose rows
fill fewer micro-batches than those of another rank gets empty micro-batches in addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch, collate, dropout_seed
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.mixture import Mixture
from finetune_trainer.data.order import global_batch, micro_batches
from finetune_trainer.data.packing import pack


@dataclass(frozen=True)
class MicroBatchPlan:
    """The micro-batches that one rank computes of a set of rows. The set is, for example, a global batch."""

    rows: Sequence[int]
    """Indices of all rows of the set, including the rows that other ranks compute."""
    tokens: int
    """Number of supervised tokens in all rows of the set, including the rows that other ranks compute."""
    micro_batches: Sequence[Sequence[Sequence[int]]]
    """This rank's micro-batches. Each micro-batch is a list of sequences, and each sequence is a list of row indices.
    Every rank has equally many micro-batches, so some may be empty."""


@dataclass(frozen=True)
class MicroBatcher:
    """Plans and makes the micro-batches of one rank out of ``examples``."""

    examples: ExampleSet
    rank: int
    world_size: int
    pad: int
    """Token id that fills the sequences of a micro-batch up to the longest one."""
    capacity: int | None
    """Largest length of a packed sequence in tokens. None means no packing: each sequence holds one example."""
    seed: int = 0
    mixture: Mixture | None = None
    """How the examples of the sources in `dataset.train.mix` are mixed. None if the job has no mix."""

    def plan_step(self, step: int, optimization: OptimizationConfig) -> MicroBatchPlan:
        """Return this rank's part of the global batch of optimizer step ``step`` (counted from 1)."""
        size, seed = optimization.global_batch_size, optimization.seed
        rows = (
            global_batch(step, rows=len(self.examples), global_batch_size=size, seed=seed)
            if self.mixture is None
            else self.mixture.global_batch(step, global_batch_size=size, seed=seed)
        )
        return self.plan_rows(rows, optimization.micro_batch_size)

    def plan_rows(self, rows: Sequence[int], micro_batch_size: int) -> MicroBatchPlan:
        """Return this rank's part of ``rows``, in micro-batches of at most ``micro_batch_size`` sequences."""
        lengths = self.examples.lengths
        sequences: Sequence[Sequence[int]] = (
            [[row] for row in rows]
            if self.capacity is None
            # The capacity is raised to the longest row. Training rows never exceed the capacity, but rows in the form
            # that the base model reads may: `evaluation.basePrompt` may have more text, and the base model reads an
            # added token as several tokens.
            else pack(
                rows, lengths, capacity=max(self.capacity, *(lengths[row] for row in rows), 1), ranks=self.world_size
            )
        )
        own = micro_batches(
            sequences, lengths, rank=self.rank, world_size=self.world_size, micro_batch_size=micro_batch_size
        )
        return MicroBatchPlan(rows, sum(self.examples[row].supervised_tokens for row in rows), own)

    def tensors(self, plan: MicroBatchPlan, *, step: int = 0) -> Iterator[Batch]:
        """Yield the tensors of each micro-batch of ``plan``. ``step`` is used only to choose the dropout masks."""
        for micro_batch in plan.micro_batches:
            sequences = [
                [(self.examples[row], dropout_seed(self.seed, step, row)) for row in sequence]
                for sequence in micro_batch
            ]
            yield collate(sequences, pad=self.pad, packed=self.capacity is not None)
