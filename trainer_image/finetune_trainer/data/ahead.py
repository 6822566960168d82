"""Makes each micro-batch of a training while the device still computes the micro-batch before it, also from the end of
one optimizer step to the beginning of the next one.

The CPU only issues the kernels of a GPU, which computes them later. So between the backward pass of a micro-batch and
the first number that the CPU reads of the GPU, the CPU has time: `loop.py` calls `make_next` there. Otherwise the GPU
would have nothing to do while the first micro-batch of each step is planned, packed, read from the disk and collated.
There is no thread: the order of all calls is fixed. On a CPU the same work is done at another time.

What is made ahead is a pure function of the data, the seed and the step. A run that ends before it uses its last
micro-batch, because it was stopped or rolls back, drops that micro-batch together with its `MicroBatchesAhead`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.micro_batches import MicroBatcher, MicroBatchPlan


class _Made(NamedTuple):
    """A micro-batch that is made, and to which step it belongs."""

    step: int
    plan: MicroBatchPlan
    batch: Batch


class MicroBatchesAhead:
    """This rank's micro-batches of the steps of a run, on the device that computes them. At most one micro-batch is
    made before it is taken."""

    def __init__(
        self, batches: MicroBatcher, steps: Iterable[int], optimization: OptimizationConfig, device: torch.device
    ) -> None:
        """``steps`` are the numbers of all steps that the run will train, in their order. Nothing is made yet."""
        self._made = _made(batches, steps, optimization, device)
        self._next: _Made | None = None

    def plan(self, step: int) -> MicroBatchPlan:
        """Return this rank's part of the global batch of ``step``, before the first micro-batch of the step is taken.
        Make this micro-batch, unless it is made."""
        return self._next_of(step).plan

    def take(self, step: int) -> Batch:
        """Return the next micro-batch of ``step``, on the device. Make it, unless it is made.

        Raises ValueError where the next micro-batch belongs to another step.
        """
        batch = self._next_of(step).batch
        self._next = None
        return batch

    def make_next(self) -> None:
        """Make the micro-batch that will be taken next, and issue its copy to the device. Do nothing where it is made,
        and after the last micro-batch of the last step."""
        if self._next is None:
            self._next = next(self._made, None)

    def _next_of(self, step: int) -> _Made:
        self.make_next()
        if self._next is None or self._next.step != step:
            following = f"one of step {self._next.step}" if self._next is not None else "none"
            raise ValueError(f"a micro-batch of step {step} was asked for, and the next one is {following}")
        return self._next


def _made(
    batches: MicroBatcher, steps: Iterable[int], optimization: OptimizationConfig, device: torch.device
) -> Iterator[_Made]:
    """Yield the micro-batches of ``steps``. Each is made when it is asked for, and this function keeps none of them."""
    for step in steps:
        plan = batches.plan_step(step, optimization)
        copied = map(partial(Batch.to, device=device), batches.tensors(plan, step=step))
        yield from map(partial(_Made, step, plan), copied)
