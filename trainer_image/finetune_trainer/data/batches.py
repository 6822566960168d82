"""Tensors of a micro-batch: right-padded or packed ids, and the targets of the positions that the loss is taken on.

Neither kind has an attention mask: padding on the right can't be seen by what comes before it, and packed examples
are told apart by their position ids (a mask of ones would join them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from finetune_trainer.data.examples import Example

IGNORED = -100
"""Target of a position without loss, as `torch.nn.functional.cross_entropy` knows it."""


class Batch(NamedTuple):
    """B sequences of at most T tokens; N tokens of them are supervised."""

    input_ids: torch.Tensor
    """(B, T), padded on the right."""
    position_ids: torch.Tensor | None
    """(B, T), from 0 in each packed example; None where each sequence is one example."""
    index: torch.Tensor
    """(N,): places in the flattened (B * T) whose logits are computed: those that predict a supervised token. The
    head is most of a small model's work."""
    targets: torch.Tensor
    """(N,): the token to predict at each of them."""
    dropout_keys: torch.Tensor
    """(B, T): what dropout at each token follows from, see `dropout_key`."""
    tokens: int
    """Supervised tokens; 0 for a dummy, whose one target is IGNORED."""
    real_tokens: int
    """Tokens that are not padding."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True) if self.position_ids is not None else None,
            index=self.index.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            dropout_keys=self.dropout_keys.to(device, non_blocking=True),
        )


DropoutSeed = Callable[[int], int]
"""The 63-bit seed of a row's dropout."""


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of dropout for an example in a step: no random state has to be saved or restored, and neither
    ranks, micro-batches nor packing change what is dropped."""
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def collate(
    sequences: Sequence[Sequence[tuple[Example, int]]],
    *,
    pad: int,
    packed: bool,
) -> Batch:
    """Return the tensors of ``sequences``, each of one example or several packed ones, every example with the seed of
    its dropout; of none, a dummy of weight 0 that costs next to nothing.

    Under ZeRO all ranks must compute the same number of micro-batches, whether they have examples or not.
    """
    if not sequences:
        one, none = torch.full((1, 1), pad), torch.zeros(1, dtype=torch.long)
        positions = torch.zeros_like(one) if packed else None
        return Batch(one, positions, none, torch.full((1,), IGNORED), torch.zeros_like(one), 0, 1)
    totals = [sum(len(example.ids) for example, _ in sequence) for sequence in sequences]
    longest = max(totals)
    input_ids = torch.full((len(sequences), longest), pad)
    position_ids = torch.zeros_like(input_ids)
    dropout_keys = torch.zeros_like(input_ids)
    index: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for line, sequence in enumerate(sequences):
        start = 0
        for example, seed in sequence:
            ids = torch.from_numpy(np.array(example.ids, dtype=np.int64))
            end = start + len(ids)
            input_ids[line, start:end] = ids
            positions = torch.arange(len(ids))
            position_ids[line, start:end] = positions
            dropout_keys[line, start:end] = seed ^ (positions * POSITION_FACTOR)
            for first, last in example.spans:
                # The logits at position t predict token t + 1: nothing predicts the first token of an example.
                first = max(first, 1)
                index.append(torch.arange(line * longest + start + first - 1, line * longest + start + last - 1))
                targets.append(ids[first:last])
            start = end
    supervised = torch.cat(targets)
    return Batch(
        input_ids,
        position_ids if packed else None,
        torch.cat(index),
        supervised,
        dropout_keys,
        len(supervised),
        sum(totals),
    )


POSITION_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""Spreads positions over all 64 bits (Knuth's multiplicative hashing: 2^64 divided by the golden ratio)."""
