"""Chooses values that a job may leave open: the ZeRO stage, the micro-batch size and the number of optimizer steps.

`resolve.py` calls `zero_stage` and `micro_batch_size` to make the run file. The trainer calls `total_steps` once it has
counted the rows.
"""

from __future__ import annotations

LARGEST_PLANNED_MICRO_BATCH = 8
"""Largest number of examples in a micro-batch where the job sets neither `microBatchSize` nor
`gradientAccumulationSteps`."""


def zero_stage(requested: int | str, *, processes: int) -> int:
    """Return the ZeRO stage. ``requested`` is `Auto` or the stage itself, from 0 to 3.

    `Auto` is stage 2 with several processes, because stage 2 shards optimizer state and gradients without more network
    traffic than plain data parallelism (arXiv 1910.02054, section 7). With one process nothing can be sharded, and
    `Auto` is stage 1, because the API allows stage 0 only with fp32.
    """
    if isinstance(requested, int):
        return requested
    return 2 if processes > 1 else 1


def process_share(global_batch_size: int, processes: int) -> int:
    """Return how many examples of a global batch one process computes, rounded up."""
    return -(-global_batch_size // processes)


def micro_batch_size(
    requested: int | None, *, accumulation_steps: int | None = None, global_batch_size: int, processes: int
) -> int:
    """Return the number of examples that one process computes at once. ``requested`` is the job's `microBatchSize`, if
    any.

    Where the job sets only `gradientAccumulationSteps`, the number is the global batch size divided by these steps and
    by the number of processes. A CEL rule of the CRD refuses jobs for which this division leaves a remainder. Where the
    job sets neither field, the number is the process's share of the global batch, at most 8.
    """
    if requested is not None:
        return requested
    if accumulation_steps is not None:
        return global_batch_size // (processes * accumulation_steps)
    return min(LARGEST_PLANNED_MICRO_BATCH, process_share(global_batch_size, processes))


def total_steps(*, rows: int, global_batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """Return the number of optimizer steps of the training. The last batch of an epoch may be smaller than the other
    batches. This batch is trained too."""
    if max_steps is not None:
        return max_steps
    return -(-rows // global_batch_size) * (epochs or 1)
