"""The step log in the bucket: immutable segments of JSON lines, one line a step; read back for the curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from finetune_core.contract import ContractModel
from finetune_core.layout import metrics_key
from finetune_trainer.storage.lineage import RunRecord
from finetune_trainer.storage.root import RunRoot


class StepRow(ContractModel):
    """One line of the step log."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean negative log-likelihood of the global batch's supervised tokens; absent where it is not a finite number or
    the step was left out after a rollback."""
    learning_rate: float
    gradient_norm: float | None = None
    """Norm over all trained parameters, before clipping; absent like the loss."""
    applied: bool = True
    """Whether the weights were updated."""
    tokens: int
    """Supervised tokens of the global batch."""
    real_tokens: int = 0
    """Tokens of prompts and answers."""
    padded_tokens: int = 0
    """Positions that were computed, padding included."""
    seconds: float
    data_seconds: float = 0.0
    """Rank 0's time for making batches; the next ones likewise."""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    """Optimizer and its communication."""
    cpu_seconds: float = 0.0
    """CPU time of the training thread in this step: what others of the process take of the core shows beside it."""
    checkpoint_seconds: float = 0.0
    """How long training stood still for checkpoints since the step before."""
    mfu: float | None = None
    memory_bytes: int = 0
    """Rank 0's memory after the step: of the GPU, on the CPU that of the process."""
    memory_peak_bytes: int = 0
    perplexity: float | None = None
    """Validation perplexity after this step, where it was scored."""
    task_score: float | None = None
    """Share of right answers after this step, where answers were generated."""


def write_segment(root: RunRoot, run: int, segment: int, rows: Iterable[StepRow]) -> None:
    """Write a segment of the step log."""
    root.write(metrics_key(run, segment), "".join(f"{row.to_json()}\n" for row in rows).encode())


def read_history(root: RunRoot, records: Mapping[int, RunRecord], run: int, step: int) -> list[StepRow]:
    """Return the rows that led to ``step`` of ``run``: its own, before them its ancestors' up to each parent."""
    keys: dict[int, list[str]] = {}
    for entry in root.list_objects("metrics/"):
        match = re.fullmatch(r"metrics/(\d+)-\d+\.jsonl", entry.key)
        if match:
            keys.setdefault(int(match[1]), []).append(entry.key)
    rows: dict[int, StepRow] = {}
    while run in records:
        for key in keys.get(run, []):
            lines = (root.read(key) or b"").decode().splitlines()
            own = (StepRow.model_validate_json(line) for line in lines if line)
            rows |= {row.step: row for row in own if row.step <= step and row.step not in rows}
        parent = records[run].parent
        if parent is None or parent.run >= run:
            break
        run, step = parent.run, parent.step
    return [rows[key] for key in sorted(rows)]
