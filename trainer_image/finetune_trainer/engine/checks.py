"""Checks of a loaded model before the first step: that no token is read by the tokens before it, that packed examples
do not attend to each other, and that the loss computed inside of the output head equals the loss of the model's logits.

`train.py` calls `check_model`. The model's code and the attention kernel decide whether examples stay separate. Without
the checks, no figure of the training would show that packed examples see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from finetune_core.errors import UserError
from finetune_trainer.data.batches import Batch, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.model.attention import Kernel
from finetune_trainer.pod.errors import first_line

PROBE_TOKENS = 24
"""The checks use at most this number of tokens of an example."""
LEAK = 0.1
"""Packing may change an example's logits by at most this share of the change that appears when two examples are read as
one text. Rounding stays far below this share, also in bf16. Without separation the whole change appears.

What follows an example may change the example's logits by at most LEAK times their spread (see `_check_causality`)."""
HEAD_DIFFERENCE = 1e-2
"""Largest relative difference between the loss computed inside of the output head and the loss of the model's logits
that rounding may cause. A larger difference shows that the model changes the logits after its output head."""


class ChosenAttention(NamedTuple):
    """The kernel that computes attention from now on."""

    kernel: Kernel
    notices: list[str]
    """For each faster kernel that was tried in vain, a sentence that says why."""


def check_model(
    engine: TrainingEngine, examples: Sequence[Example], *, pad: int, packing: bool, kernels: Sequence[Kernel]
) -> ChosenAttention:
    """Find the first of ``kernels`` with which the model of ``engine`` passes the checks on the first two of
    ``examples``. The engine computes with this kernel from now on. All ranks must call this function together.

    Raises UserError where the model is not causal, or where ``packing`` is wanted and packed examples see each other
    with all kernels. Also raises UserError where a kernel that the job names can't compute the model and another kernel
    can. The loss is computed inside of the output head and from the full logits. Where the two losses
    differ, because the model changes the logits after its output head, the engine computes every loss from the full
    logits from now on.
    """
    # Every token becomes a target, so that very short examples have a target too.
    first, second = (_shortened(examples[index % len(examples)]) for index in (0, 1))
    notices: list[str] = []
    for kernel in kernels:
        try:
            engine.use_attention(kernel)
            _check_separation(engine, first, second, pad, packing=packing)
        except torch.OutOfMemoryError:
            raise
        except (UserError, RuntimeError, ValueError, ImportError) as error:
            # The checks raise UserError. Kernels raise the other errors where they can't compute a model's shapes. In
            # both cases a slower kernel may still work.
            if len(kernels) == 1 and not isinstance(error, UserError):
                # The error may also have another cause than the kernel, such as a lack of memory or a lost rank. Then
                # no other kernel works either.
                _refuse_if_another_works(engine, first, second, pad, packing=packing, named=kernel, error=error)
            if kernel is kernels[-1]:
                raise
            notices.append(f"training.attention: {kernel} can't be used for this model: {first_line(error)}")
            continue
        break
    with torch.no_grad():
        _choose_loss(engine, collate([[(second, 2)]], pad=pad, packed=False))
    engine.train()
    return ChosenAttention(kernel, notices)


def _shortened(example: Example) -> Example:
    ids = example.ids[:PROBE_TOKENS]
    return Example(ids, [(0, len(ids))])


def _check_separation(engine: TrainingEngine, first: Example, second: Example, pad: int, *, packing: bool) -> None:
    with torch.no_grad():
        for training in (False, True):
            engine.train(training)
            if packing:
                _check_isolation(engine, first, second, pad)
        _check_causality(engine, first, second, pad)


def _refuse_if_another_works(
    engine: TrainingEngine,
    first: Example,
    second: Example,
    pad: int,
    *,
    packing: bool,
    named: Kernel,
    error: Exception,
) -> None:
    """Raise UserError where SDPA or EAGER can compute the model. ``named`` is the kernel that failed with ``error``, so
    it is not tried again."""
    for other in (Kernel.SDPA, Kernel.EAGER):
        if other is named:
            continue
        try:
            engine.use_attention(other)
            _check_separation(engine, first, second, pad, packing=packing)
        except (UserError, RuntimeError, ValueError, ImportError):
            continue
        raise UserError(
            "training.attention",
            f"must not be {named} for this model, which {other} can compute: {first_line(error)}",
        ) from error


def _check_isolation(engine: TrainingEngine, first: Example, second: Example, pad: int) -> None:
    """Raise UserError where the attention does not keep packed examples apart.

    The logits of ``second`` are computed three times: alone, packed behind ``first``, and read as the continuation of
    ``first``. The change by packing must be at most LEAK times the change by reading it as a continuation.
    """
    tokens = len(second.ids) - 1
    alone = collate([[(second, 2)]], pad=pad, packed=True)
    packed = collate([[(first, 1), (second, 2)]], pad=pad, packed=True)
    length = packed.input_ids.shape[1]
    joined = packed._replace(
        position_ids=torch.arange(length).unsqueeze(0),
        starts=torch.tensor([0, length], dtype=torch.int32),
        longest=length,
    )
    wanted, found, leaked = (_logits(engine, batch)[-tokens:] for batch in (alone, packed, joined))
    difference, contaminated = (float((other - wanted).abs().max()) for other in (found, leaked))
    if not difference <= LEAK * contaminated:
        raise UserError(
            "dataset.packing",
            "must be false for this model: its attention lets packed examples see each other (the logits differ by"
            f" {difference:.2g} from those of an example alone; {contaminated:.2g} is what no isolation at all gives)",
        )


def _check_causality(engine: TrainingEngine, first: Example, second: Example, pad: int) -> None:
    """Raise UserError where the logits of ``first`` change by more than LEAK times their spread when ``second``
    follows. A model whose logits change so reads a text in both directions, and would be trained to copy. The mean
    change of all logits is compared and not the largest, because in bf16 a mixture of experts may send a single token
    to another expert."""
    tokens = len(first.ids) - 1
    longer = Example((*first.ids, *second.ids), [(0, len(first.ids) + len(second.ids))])
    wanted, found = (
        _logits(engine, collate([[(example, 1)]], pad=pad, packed=False))[:tokens] for example in (first, longer)
    )
    difference, spread = float((found - wanted).abs().mean()), float((wanted - wanted.mean()).abs().mean())
    if not difference <= LEAK * spread:
        raise UserError(
            "model",
            "must be a causal language model: what follows a token changes what this model says before it (its logits"
            f" differ by {difference:.2g}, and spread over {spread:.2g})",
        )


def _logits(engine: TrainingEngine, batch: Batch) -> torch.Tensor:
    return engine.logits(batch.to(engine.device)).float()


def _choose_loss(engine: TrainingEngine, batch: Batch) -> None:
    batch = batch.to(engine.device)
    inside, outside = float(engine.loss(batch)), float(engine.loss(batch, full_logits=True))
    if not abs(inside - outside) <= HEAD_DIFFERENCE * abs(outside):
        engine.use_full_logits()
