"""The line of a step in the pod's log."""

from __future__ import annotations

import pytest

from finetune_trainer.reporting.progress import step_line
from finetune_trainer.storage.step_log import StepRow

ROW = StepRow(step=20, epoch=1.0, learning_rate=0.001, seconds=2.0, tokens=970)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"loss": 1.234, "gradient_norm": 0.52}, "step 20/100 loss 1.2340 rate 0.001 norm 0.52 485 tok/s"),
        ({"loss": None, "gradient_norm": None, "applied": False}, "step 20/100 loss not finite rate 0.001 485 tok/s"),
        ({"loss": 1.234, "gradient_norm": None, "applied": False}, "step 20/100 loss 1.2340 rate 0.001 485 tok/s"),
        ({"loss": None, "applied": False, "tokens": 0}, "step 20/100 left out rate 0.001 485 tok/s"),
    ],
    ids=["a usual step", "a loss that is not finite", "a gradient that is not finite", "rows that a rollback excludes"],
)
def test_the_line_says_what_became_of_the_step(changes: dict[str, object], line: str) -> None:
    assert step_line(ROW.model_copy(update=changes), 100, 485.0) == line
