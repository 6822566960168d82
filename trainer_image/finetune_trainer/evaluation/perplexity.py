"""The perplexity of a model over a whole set of examples.

The mean is taken once over the supervised tokens of all ranks and never over means, so that perplexity does not depend
on how examples are grouped into micro-batches. `scorer.py` calls this module.
"""

from __future__ import annotations

import math

import torch

from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.engine import Engine
from finetune_trainer.ranks.gang import Gang

LARGEST_PERPLEXITY = 1e30
"""Upper bound of what is reported, because exp of a large mean loss overflows."""


def perplexity(engine: Engine, gang: Gang, batches: MicroBatcher, *, batch_size: int) -> float:
    """Return exp(summed negative log-likelihood / supervised tokens) over all examples of ``batches``.

    A collective: all ranks call this function and get the same value. ``batch_size``: sequences per micro-batch.
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
