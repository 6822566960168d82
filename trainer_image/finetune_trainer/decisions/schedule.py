"""The learning rate as a pure function of the step, so that no schedule state has to be saved or restored.

`loop.py` calls `learning_rate_at` for every optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetune_core.contract import OptimizationConfig
from finetune_trainer.storage.lineage import Rollback


def learning_rate_at(
    step: int, total_steps: int, optimization: OptimizationConfig, rollbacks: Sequence[Rollback] = ()
) -> float:
    """Return the learning rate of the update at ``step``, which counts from 1 to ``total_steps``.

    During warm-up the rate rises linearly, and reaches its peak at the last warm-up step. No step has rate 0. After the
    warm-up a linear or cosine schedule falls towards zero: one more step after the last would have rate 0. Any other
    schedule stays at the peak. Each rollback lowers the rate of all steps after the step that the rollback returned to.
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
