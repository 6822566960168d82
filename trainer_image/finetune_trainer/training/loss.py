"""The loss of a micro-batch as a sum, and the perplexity of a whole data set: means are taken over all of the tokens
at once, never over means, so that they don't depend on how examples are grouped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from finetune_trainer.data.batches import IGNORED, Batch, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.data.order import micro_batches
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.gang import Gang

LARGEST_PERPLEXITY = 1e30


def summed_loss(engine: Engine, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of the batch's supervised tokens, in fp32.

    A dummy batch gives a zero that gradients flow through, so that every rank runs the same backward pass.
    """
    logits = engine.forward(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=batch.positions,
    ).logits
    if batch.tokens == 0:
        return logits.float().sum() * 0.0
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def perplexity(engine: Engine, gang: Gang, examples: Sequence[Example], *, batch_size: int, pad: int) -> float:
    """Return exp(summed negative log-likelihood / supervised tokens) over all ``examples``; a collective."""
    lengths = [len(example.ids) for example in examples]
    own = micro_batches(
        range(len(examples)), lengths, rank=gang.rank, world_size=gang.world_size, micro_batch_size=batch_size
    )
    nll, tokens = 0.0, 0
    engine.train(False)
    with torch.no_grad():
        for rows in own:
            batch = collate([examples[row] for row in rows], pad).to(engine.device)
            nll += float(summed_loss(engine, batch))
            tokens += batch.tokens
    engine.train()
    nll, count = gang.total([nll, tokens])
    mean = nll / max(1.0, count)
    return min(math.exp(mean), LARGEST_PERPLEXITY) if mean < math.log(LARGEST_PERPLEXITY) else LARGEST_PERPLEXITY
