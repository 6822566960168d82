"""The step log in the bucket: immutable segments of JSON lines, one line per optimizer step. `checkpoints/` writes a
segment with each checkpoint and reads the history when a run resumes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from finetune_core.contract import ContractModel
from finetune_core.layout import metrics_key
from finetune_trainer.storage.lineage import RunRecord
from finetune_trainer.storage.root import RunRoot


class StepRow(ContractModel):
    """One line of the step log, with the figures of one optimizer step."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean negative log-likelihood (nats) of the global batch's supervised tokens. Absent if the value is not finite,
    or if the step was skipped after a rollback."""
    learning_rate: float
    gradient_norm: float | None = None
    """Norm of the gradient over all trained parameters, before clipping. Absent in the same cases as `loss`."""
    applied: bool = True
    """Whether the optimizer updated the weights in this step."""
    tokens: int
    """Number of supervised tokens in the global batch."""
    real_tokens: int = 0
    """Number of tokens in prompts and answers, without padding."""
    padded_tokens: int = 0
    """Number of token positions that were computed, including padding."""
    seconds: float
    data_seconds: float = 0.0
    """Time that rank 0 spent on making batches. The following times are also those of rank 0."""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    """Time of the optimizer update, including its communication."""
    cpu_seconds: float = 0.0
    """CPU time of the training thread in this step. A value well below `seconds` shows that other threads used the
    core."""
    checkpoint_seconds: float = 0.0
    """Time since the previous step during which training waited for checkpoints."""
    mfu: float | None = None
    memory_bytes: int = 0
    """Memory in use on rank 0 after the step: GPU memory, or the memory of the process if it trains on the CPU."""
    memory_peak_bytes: int = 0
    perplexity: float | None = None
    """Validation perplexity after this step, if the step was evaluated."""
    task_score: float | None = None
    """Share of correct answers on the validation set after this step, if answers were generated."""


def write_segment(root: RunRoot, run: int, segment: int, rows: Iterable[StepRow]) -> None:
    """Write one segment of the step log of ``run``."""
    root.write(metrics_key(run, segment), "".join(f"{row.to_json()}\n" for row in rows).encode())


def read_history(root: RunRoot, records: Mapping[int, RunRecord], run: int, step: int) -> list[StepRow]:
    """Return the rows of all steps that led to ``step`` of ``run``: those of the run itself, preceded by those of its
    ancestors up to each parent checkpoint."""
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
