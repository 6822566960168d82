"""The loss of a micro-batch as a sum, and the perplexity of a whole data set: means are taken over all of the tokens
at once, never over means, so that they don't depend on how examples are grouped."""

from __future__ import annotations

import math

import torch

from finetune_trainer.data.batches import Batch
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.engine import Engine
from finetune_trainer.ranks.gang import Gang

LARGEST_PERPLEXITY = 1e30


def summed_loss(engine: Engine, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of the batch's supervised tokens, in fp32.

    A dummy batch gives a zero that gradients flow through, so that every rank runs the same backward pass.
    """
    return engine.loss(batch)


def perplexity(engine: Engine, gang: Gang, batches: MicroBatcher, *, batch_size: int) -> float:
    """Return exp(summed negative log-likelihood / supervised tokens) over all examples; a collective."""
    plan = batches.plan_rows(range(len(batches.examples)), batch_size)
    nll = 0.0
    engine.train(False)
    with torch.no_grad():
        for batch in batches.tensors(plan):
            gang.check_stop()
            nll += float(summed_loss(engine, batch.to(engine.device)))
    engine.train()
    mean = gang.sum_over_ranks([nll])[0] / max(1, plan.tokens)
    return min(math.exp(mean), LARGEST_PERPLEXITY) if mean < math.log(LARGEST_PERPLEXITY) else LARGEST_PERPLEXITY
