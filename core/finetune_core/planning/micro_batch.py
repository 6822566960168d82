"""How a process computes its share of a global batch after attempts that ran out of memory: half the micro-batch in
twice the gradient accumulation steps. The optimisation stays the same, because the global batch does.

`resolve.py` calls `micro_batch_of` for the run file of an attempt, and the operator's `decide/out_of_memory.py` for its
decision whether another attempt follows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """How a process computes its share of a global batch."""

    size: int
    """Examples (with `dataset.packing`: sequences) that the process computes at once."""
    accumulation_steps: int
    """Micro-batches in an optimizer step, where examples are not packed."""


def micro_batch_of(planned: int, *, halvings: int, share: int) -> MicroBatch:
    """Return the micro-batch of an attempt before which ``halvings`` attempts of the job ran out of memory.

    ``planned`` is the size that the spec sets or leaves to the plan. ``share`` is how many examples of a global batch
    one process computes (`process_share` of the planning), which is less than ``planned`` where the spec asks for more
    than there is. An odd size is rounded down when it is halved.
    """
    size = max(1, min(planned, share) >> halvings)
    return MicroBatch(size=size, accumulation_steps=-(-share // size))
