"""The learning rate as a pure function of the step: nothing to save, nothing to restore, nothing to drift."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetune_core.contract import OptimizationConfig
from finetune_trainer.storage.lineage import Rollback


def rate(step: int, total_steps: int, optimization: OptimizationConfig, rollbacks: Sequence[Rollback] = ()) -> float:
    """Return the rate of the update that step ``step`` (from 1 to ``total_steps``) applies.

    The warm-up rises in a line and reaches the peak at its last step; no step has rate 0. After it the rate
    falls from the peak towards zero, which the step after the last would have. Steps after the one that a rollback
    returned to have its factor on top.
    """
    factor = math.prod(rollback.rate_factor for rollback in rollbacks if step > rollback.step)
    peak, warmup = optimization.learning_rate * factor, optimization.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if optimization.schedule == "Linear":
        return peak * max(0.0, 1 - done)
    if optimization.schedule == "Cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak
