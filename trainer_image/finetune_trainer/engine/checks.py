"""Two checks of a loaded model before the first step: that packed examples do not see each other, and that the loss
computed inside of the output head equals the loss of the model's logits.

`train.py` calls `check_model`. Whether attention separates packed examples depends on the model's code and on the
attention backend, and no number of the training would show a leak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune_core.errors import UserError
from finetune_trainer.data.batches import Batch, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.engine import Engine

PROBE_TOKENS = 24
"""How many tokens of each example the checks use."""
LEAK = 0.1
"""Largest difference that packing may make to an example's logits, as a share of the difference that no separation at
all makes. Rounding stays far below this bound, also in bf16, and a leak reaches the whole difference."""
HEAD_DIFFERENCE = 1e-2
"""Largest relative difference between the two losses. Both compute the same sum, so only rounding may differ."""


def check_model(engine: Engine, examples: Sequence[Example], *, pad: int, packing: bool) -> None:
    """Check the model of ``engine`` with the first two of ``examples``. All ranks must call this function together.

    Raises UserError where ``packing`` is wanted and packed examples see each other. Where a model changes the logits
    after its head, the engine computes the loss from the full logits from now on.
    """
    # Every token becomes a target, so that very short examples have a target too.
    first, second = (_shortened(examples[index % len(examples)]) for index in (0, 1))
    with torch.no_grad():
        for training in (False, True):
            engine.train(training)
            if packing:
                _check_isolation(engine, first, second, pad)
        _choose_loss(engine, collate([[(second, 2)]], pad=pad, packed=False))
    engine.train()


def _shortened(example: Example) -> Example:
    ids = example.ids[:PROBE_TOKENS]
    return Example(ids, [(0, len(ids))])


def _check_isolation(engine: Engine, first: Example, second: Example, pad: int) -> None:
    """Compare the logits of ``second`` in three cases: alone, packed behind ``first``, and read as the continuation of
    ``first``."""
    tokens = len(second.ids) - 1
    alone = collate([[(second, 2)]], pad=pad, packed=True)
    packed = collate([[(first, 1), (second, 2)]], pad=pad, packed=True)
    joined = packed._replace(position_ids=torch.arange(packed.input_ids.shape[1]).unsqueeze(0))
    wanted, found, leaked = (
        engine.logits(batch.to(engine.device))[-tokens:].float() for batch in (alone, packed, joined)
    )
    difference, contaminated = (float((other - wanted).abs().max()) for other in (found, leaked))
    if not difference <= LEAK * contaminated:
        raise UserError(
            "dataset.packing",
            "must be false for this model: its attention lets packed examples see each other (the logits differ by"
            f" {difference:.2g} from those of an example alone; {contaminated:.2g} is what no isolation at all gives)",
        )


def _choose_loss(engine: Engine, batch: Batch) -> None:
    batch = batch.to(engine.device)
    inside, outside = float(engine.loss(batch)), float(engine.loss(batch, full_logits=True))
    if not abs(inside - outside) <= HEAD_DIFFERENCE * abs(outside):
        engine.use_full_logits()
