"""Chooses what a job leaves open about batches and ZeRO; pure functions of the spec."""

from __future__ import annotations

from finetune_core.errors import UserError


def zero_stage(requested: int | str, *, processes: int) -> int:
    """Return the ZeRO stage to run with.

    Auto is 2 with several processes (optimizer state and gradients are sharded at the traffic of plain data
    parallelism, arXiv 1910.02054 section 7) and 1 with one, where there is nothing to shard.
    """
    if isinstance(requested, int):
        return requested
    return 2 if processes > 1 else 1


def micro_batch_size(requested: int | None, *, global_batch_size: int, processes: int) -> int:
    """Return the examples that one process computes at once.

    Without a request it is the process's whole share of the global batch, at most 8. Raises UserError where the
    request is larger than the share of a process.
    """
    share = -(-global_batch_size // processes)
    if requested is None:
        return min(8, share)
    if requested > share:
        raise UserError(
            "spec.training.microBatchSize",
            f"must be at most {share}, the share of one of {processes} processes in a globalBatchSize of"
            f" {global_batch_size}",
        )
    return requested


def total_steps(*, rows: int, global_batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """Return the number of global batches of the run: the last batch of an epoch is partial, never dropped."""
    if max_steps is not None:
        return max_steps
    return -(-rows // global_batch_size) * (epochs or 1)
