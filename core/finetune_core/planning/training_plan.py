"""Chooses what a job leaves open about batches and ZeRO; pure functions of the spec."""

from __future__ import annotations

LARGEST_PLANNED_MICRO_BATCH = 8


def zero_stage(requested: int | str, *, processes: int) -> int:
    """Return the ZeRO stage to run with.

    Auto is 2 with several processes (optimizer state and gradients are sharded at the traffic of plain data
    parallelism, arXiv 1910.02054 section 7) and 1 with one, where there is nothing to shard.
    """
    if isinstance(requested, int):
        return requested
    return 2 if processes > 1 else 1


def process_share(global_batch_size: int, processes: int) -> int:
    """SHORT"""
    return -(-global_batch_size // processes)


def micro_batch_size(
    requested: int | None, *, accumulation_steps: int | None = None, global_batch_size: int, processes: int
) -> int:
    """Return the examples that one process computes at once.

    Without a request it is what `gradientAccumulationSteps` leaves (the schema sees to it that there is no remainder),
    and without that the process's whole share of the global batch, at most 8.
    """
    if requested is not None:
        return requested
    if accumulation_steps is not None:
        return global_batch_size // (processes * accumulation_steps)
    return min(LARGEST_PLANNED_MICRO_BATCH, process_share(global_batch_size, processes))


def total_steps(*, rows: int, global_batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """Return the number of global batches of the run: the last batch of an epoch is partial, never dropped."""
    if max_steps is not None:
        return max_steps
    return -(-rows // global_batch_size) * (epochs or 1)
