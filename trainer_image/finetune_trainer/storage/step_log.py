"""The step log in the bucket: files of JSON lines that are never changed, with one line for each optimizer step.
`checkpoints/` writes such a file (a segment) with each checkpoint, and reads all earlier lines when a run resumes.
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
    """Mean negative log-likelihood (nats) of the supervised tokens in the global batch. None if the value is not
    finite, or if the step was not trained because a rollback excluded its batch."""
    learning_rate: float
    gradient_norm: float | None = None
    """L2 norm of the gradient over all trained parameters, before clipping. None if it is not finite, or if the step
    was not trained."""
    applied: bool = True
    """Whether the optimizer updated the weights in this step."""
    tokens: int
    """Number of supervised tokens in the global batch; 0 if the step was not trained."""
    real_tokens: int = 0
    """Number of tokens in the global batch, prompts included and padding excluded."""
    padded_tokens: int = 0
    """Number of token positions that were computed on all ranks, padding included."""
    seconds: float
    """Seconds from the begin of the step until the CPU had issued its update. On a GPU the next step has begun then,
    and the rest of the update counts there. All times of a row are those of rank 0."""
    data_seconds: float = 0.0
    """Seconds that the CPU spent on making micro-batches during this step. The first micro-batch of the next step is
    made in this step, and that of this step was made in the step before, unless this is the first step of a run. A GPU
    computes meanwhile, so these seconds delay the training only where the GPU has nothing left to compute."""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    """Seconds of the optimizer update, including the exchange of updated weights between ranks. The exchange of
    gradients is part of `backward_seconds`. On a GPU this is the update of the step before, which was still computed
    when the row of that step was written."""
    cpu_seconds: float = 0.0
    """CPU time in seconds that the training thread used in this step. A value well below `seconds` shows that the
    thread had to wait, for example because other threads used its CPU core."""
    checkpoint_seconds: float = 0.0
    """Seconds that training spent on saving checkpoints since the step before."""
    mfu: float | None = None
    memory_bytes: int = 0
    """Bytes in use on rank 0 after the step: GPU memory, or the memory of the process if training runs on the CPU."""
    memory_peak_bytes: int = 0
    perplexity: float | None = None
    """Validation perplexity after this step, or None if the step was not evaluated."""
    task_score: float | None = None
    """Value of the task's main score on the validation rows after this step. None if no answers were generated."""


def write_segment(root: RunRoot, run: int, segment: int, rows: Iterable[StepRow]) -> None:
    """Write ``rows`` as segment number ``segment`` of the step log of ``run``."""
    root.write(metrics_key(run, segment), "".join(f"{row.to_json()}\n" for row in rows).encode())


def read_history(root: RunRoot, records: Mapping[int, RunRecord], run: int, step: int) -> list[StepRow]:
    """Return the rows of all steps that led to step ``step`` of run ``run``, ordered by step. Rows after the checkpoint
    from which the run resumed come from the run itself, earlier rows from the run that wrote this checkpoint, and so
    on. If both runs have a row of the same step, that of the later run counts: it has the scores of an evaluation that
    SIGTERM interrupted in the earlier run."""
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
