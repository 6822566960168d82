"""Two checks of a loaded model before the first step: that packed examples do not attend to each other, and that the
loss computed inside of the output head equals the loss of the model's logits.

`train.py` calls `check_model`. The model's code and the attention backend decide whether packed examples stay separate.
Without the check, no figure of the training would show that they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune_core.errors import UserError
from finetune_trainer.data.batches import Batch, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.engine import Engine

PROBE_TOKENS = 24
"""The checks use at most this number of tokens of an example."""
LEAK = 0.1
"""Packing may change an example's logits by at most this share of the change that appears when two examples are read as
one text. Rounding stays far below this share, also in bf16. Without separation the whole change appears."""
HEAD_DIFFERENCE = 1e-2
"""Largest relative difference between the loss computed inside of the output head and the loss of the model's logits.
Both are the same sum, so only rounding may make them differ."""


def check_model(engine: Engine, examples: Sequence[Example], *, pad: int, packing: bool) -> None:
    """Check the model of ``engine`` with the first two of ``examples``. All ranks must call this function together.

    Raises UserError where ``packing`` is wanted and packed examples see each other. The loss is computed inside of the
    output head and from the full logits. Where the two losses differ, because the model changes the logits after its
    output head, the engine computes every loss from the full logits from now on.
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
    """Raise UserError where packing changes the logits of ``second`` by more than the share LEAK. The logits are
    compared in three cases: ``second`` alone, packed behind ``first``, and read as the continuation of ``first``."""
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
