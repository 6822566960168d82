"""Restores what the decisions about training remember of earlier steps, by replaying the step log from the bucket: the
best evaluation, the newest evaluated step, and the state of the stability monitor.

`train.py` calls `replay_decisions` on rank 0 with the rows of the step log, and sends the returned state to all ranks.
Checkpoints therefore need not hold this state.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.contract import ContractModel, EvaluationConfig
from finetune_trainer.decisions.selection import Selection, selection_after
from finetune_trainer.decisions.stability import MonitorState, monitor_after
from finetune_trainer.storage.step_log import StepRow


class ReplayedDecisions(ContractModel):
    """The best and the newest evaluation so far, and the memory of the stability monitor, before a run's first
    step."""

    selection: Selection
    monitor: MonitorState
    evaluated_step: int | None = None
    """The newest step whose evaluation is part of `selection`. None if no step was evaluated."""


def replay_decisions(config: EvaluationConfig, history: Sequence[StepRow]) -> ReplayedDecisions:
    """Return the state after ``history``, the rows of all steps that led to the start of the run, oldest first."""
    return ReplayedDecisions(
        selection=selection_after(config, history),
        monitor=monitor_after((row.step, row.loss, row.gradient_norm) for row in history),
        evaluated_step=next((row.step for row in reversed(history) if row.perplexity is not None), None),
    )
