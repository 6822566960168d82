"""Chooses values that a job may leave open: the ZeRO stage, the micro-batch size and the number of optimizer steps.

`resolve.py` calls `zero_stage` and `micro_batch_size` to make the run file. The trainer calls `total_steps` once it has
counted the rows.
"""

from __future__ import annotations

LARGEST_PLANNED_MICRO_BATCH = 8
"""Largest number of examples in a micro-batch where the job sets neither `microBatchSize` nor
`gradientAccumulationSteps`."""


def zero_stage(requested: int | str, *, processes: int, lora: bool, configured: bool) -> int | None:
    """Return the ZeRO stage; None where one process trains without DeepSpeed. ``requested`` is `Auto`, `None` or the
    stage itself, from 0 to 3. ``lora`` says whether the method is LoRA, and ``configured`` whether the job sets
    anything else of DeepSpeed.

    `Auto` is stage 2, because stage 2 shards optimizer state and gradients without more network traffic than plain data
    parallelism (arXiv 1910.02054, section 7). One process that trains with LoRA needs nothing of DeepSpeed, because
    nothing can be sharded. A full fine-tuning in one process stays with DeepSpeed, unless the job asks for `None`.
    """
    if isinstance(requested, int):
        return requested
    if requested == "None" or (processes == 1 and lora and not configured):
        return None
    return 2


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
