"""What led to where a run starts, replayed from the step log: the best evaluation so far, and what the stability
monitor remembers. Made by rank 0, which reads the log, and shared with all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_core.contract import ContractModel, EvaluationConfig
from finetune_trainer.decisions.selection import Selection, begin
from finetune_trainer.decisions.stability import Watch, replay
from finetune_trainer.storage.step_log import StepRow


class Past(ContractModel):
    """The state of everything that decides by the steps before."""

    selection: Selection
    watch: Watch


def past_of(config: EvaluationConfig, history: Sequence[StepRow]) -> Past:
    """Return the past that ``history`` tells: the steps that led to the start, oldest first."""
    return Past(
        selection=begin(config, history),
        watch=replay((row.step, row.loss, row.gradient_norm) for row in history),
    )
