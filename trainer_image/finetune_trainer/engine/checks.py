"""Two checks of the loaded model before the first step: packed examples don't see each other, and the loss that is
taken inside of the head is the loss of the model's logits.

Whether attention isolates packed examples depends on the model's code and the attention backend, and a leak would
show in no number of the training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune_core.errors import UserError
from finetune_trainer.data.batches import Batch, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.engine import Engine

PROBE_TOKENS = 24
LEAK = 0.1
"""A packed example may differ from an isolated one by this share of what full contamination changes: rounding is far
below it in bf16 too, and a leak is all or nothing."""
HEAD_DIFFERENCE = 1e-2
"""Two ways to the same loss differ by rounding only."""


def check_model(engine: Engine, examples: Sequence[Example], *, pad: int, packing: bool) -> None:
    """Compare ways to compute the same, on the first two ``examples``; a collective.

    Raises UserError where ``packing`` is asked for and leaks. Where the model changes logits after its head the
    engine takes the loss from whole logits from now on.
    """
    # Every token is a target, also of very short examples.
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
    """Compare the logits of ``second`` alone, packed behind ``first``, and read as the continuation of it."""
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
    inside, outside = float(engine.loss(batch)), float(engine.loss(batch, whole_logits=True))
    if not abs(inside - outside) <= HEAD_DIFFERENCE * abs(outside):
        engine.use_whole_logits()
