"""Computes the perplexity of a model over a whole set of examples.

Losses are summed over the supervised tokens of all ranks, and the mean is taken once at the end. So the perplexity does
not depend on how examples are grouped into micro-batches. `scorer.py` calls this module.
"""

from __future__ import annotations

import math

import torch

from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.ranks.gang import Gang

LARGEST_PERPLEXITY = 1e30
"""Largest perplexity that is returned. Without a limit, the exponential of a very large mean loss would overflow."""


def perplexity(engine: TrainingEngine, gang: Gang, batches: MicroBatcher, *, batch_size: int) -> float:
    """Return exp(summed negative log-likelihood / number of supervised tokens) over all examples of ``batches``.

    All ranks must call this together, and all get the same value. ``batch_size`` is the number of sequences that a rank
    computes at once.
    """
    plan = batches.plan_rows(range(len(batches.examples)), batch_size)
    nll = 0.0
    engine.train(False)
    with torch.no_grad():
        for batch in batches.tensors(plan):
            gang.check_stop()
            nll += float(engine.loss(batch.to(engine.device)))
    engine.train()
    mean = gang.sum_over_ranks([nll])[0] / max(1, plan.tokens)
    return min(math.exp(mean), LARGEST_PERPLEXITY) if mean < math.log(LARGEST_PERPLEXITY) else LARGEST_PERPLEXITY
