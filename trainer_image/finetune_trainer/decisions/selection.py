"""Decides which evaluation is the best so far, and whether `evaluation.patience` ends the training early.

The functions are pure. `loop.py` adds every evaluation, and after a resume `replay.py` computes the state again from
the step log, so that nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_core.api.evaluation import BestBy
from finetune_core.contract import CheckpointRecord, ContractModel, EvaluationConfig
from finetune_trainer.storage.step_log import StepRow


class Selection(ContractModel):
    """The best evaluation so far, and the settings that decide which evaluation is the best."""

    best_by: BestBy
    min_delta: float
    """An evaluation counts as an improvement only where it is better than the best evaluation by more than this
    value."""
    patience: int | None = None
    """Number of evaluations in a row without improvement after which the run stops. None means that the run never stops
    early."""
    best: float | None = None
    """Perplexity or task score of the best evaluation, None before the first."""
    best_step: int = 0
    """Step of the best evaluation, 0 before the first."""
    evaluations_without_improvement: int = 0
    """Number of evaluations since the best evaluation. Those without the value that `best_by` names do not count."""

    @property
    def exhausted(self) -> bool:
        """Return whether `patience` evaluations in a row were no improvement."""
        return self.patience is not None and self.evaluations_without_improvement >= self.patience

    def improves(self, value: float) -> bool:
        """Return whether ``value`` is better than the best value by more than `min_delta`, or is the first value."""
        if self.best is None:
            return True
        gain = self.best - value if self.best_by == "Perplexity" else value - self.best
        return gain > self.min_delta

    def after(self, step: int, *, perplexity: float | None, task_score: float | None) -> Selection:
        """Return the selection after the evaluation of ``step``. An evaluation without the value that `best_by` names
        changes nothing."""
        value = perplexity if self.best_by == "Perplexity" else task_score
        if value is None:
            return self
        if self.improves(value):
            return self.model_copy(update={"best": value, "best_step": step, "evaluations_without_improvement": 0})
        return self.model_copy(update={"evaluations_without_improvement": self.evaluations_without_improvement + 1})


def selection_after(config: EvaluationConfig, history: Iterable[StepRow] = ()) -> Selection:
    """Return the selection after ``history``, the rows of all steps before this run, oldest first."""
    selection = Selection(best_by=config.best_by, min_delta=config.min_delta, patience=config.patience)
    for row in history:
        selection = selection.after(row.step, perplexity=row.perplexity, task_score=row.task_score)
    return selection


def best_first(records: Iterable[CheckpointRecord], best_by: BestBy) -> list[CheckpointRecord]:
    """Return the records sorted from best to worst by the value that ``best_by`` names. Records without this value are
    left out. Of equal records the earlier comes first.

    With TaskScore, the lower perplexity decides between equal scores. Task scores are often equal, because most of them
    only count right answers.
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
