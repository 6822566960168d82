"""Which evaluation is the best so far, and when patience is spent. Pure: replayed from the step log after a resume, so
that nothing about it has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_core.api.evaluation import BestBy
from finetune_core.contract import CheckpointRecord, ContractModel, EvaluationConfig
from finetune_trainer.storage.steplog import StepRow


class Selection(ContractModel):
    """How the evaluations of a run went so far."""

    best_by: BestBy
    min_delta: float
    patience: int | None = None
    best: float | None = None
    """The value to beat."""
    best_step: int = 0
    waited: int = 0
    """Evaluations since it improved."""

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as ``patience`` brought no improvement."""
        return self.patience is not None and self.waited >= self.patience

    def improves(self, value: float) -> bool:
        """Return whether ``value`` is better than the best by more than ``min_delta``."""
        if self.best is None:
            return True
        gain = self.best - value if self.best_by == "Perplexity" else value - self.best
        return gain > self.min_delta

    def after(self, step: int, *, perplexity: float | None, task_score: float | None) -> Selection:
        """Return the selection after an evaluation; one without the value that counts changes nothing."""
        value = perplexity if self.best_by == "Perplexity" else task_score
        if value is None:
            return self
        if self.improves(value):
            return self.model_copy(update={"best": value, "best_step": step, "waited": 0})
        return self.model_copy(update={"waited": self.waited + 1})


def begin(config: EvaluationConfig, history: Iterable[StepRow] = ()) -> Selection:
    """Return the selection that ``history``, the steps before this run, leads to."""
    selection = Selection(best_by=config.best_by, min_delta=config.min_delta, patience=config.patience)
    for row in history:
        selection = selection.after(row.step, perplexity=row.perplexity, task_score=row.task_score)
    return selection


def best_first(records: Iterable[CheckpointRecord], best_by: BestBy) -> list[CheckpointRecord]:
    """Return the records that were scored, the best first, the earlier one of equals.

    By task score the lower perplexity decides between equals: answers are right or wrong, and many checkpoints tie.
    """

    def order(record: CheckpointRecord) -> tuple[float, float, int, int]:
        perplexity = record.perplexity if record.perplexity is not None else float("inf")
        score = record.task_score if best_by == "TaskScore" and record.task_score is not None else 0.0
        return (-score, perplexity, record.run, record.step)

    wanted = [
        record
        for record in records
        if (record.perplexity if best_by == "Perplexity" else record.task_score) is not None
    ]
    return sorted(wanted, key=order)
