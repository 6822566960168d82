"""Builds the tensors of a micro-batch: token ids, right-padded or packed, and the target token of each position that
has a loss. `micro_batches.py` calls `collate`.

No attention mask is used. With causal attention, a token can't attend to padding on its right, and packed examples are
separated by their position ids, which a mask of ones would override.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from finetune_trainer.data.examples import Example

IGNORED = -100
"""Target of a position without loss, as in `torch.nn.functional.cross_entropy`."""
POSITION_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""Multiplier that spreads positions over all 64 bits (Knuth's multiplicative hashing: 2^64 divided by the golden
ratio).
"""


class Batch(NamedTuple):
    """A micro-batch: B sequences of at most T tokens, in which N tokens are supervised."""

    input_ids: torch.Tensor
    """Token ids of shape (B, T), padded on the right."""
    position_ids: torch.Tensor | None
    """Positions of shape (B, T), which restart at 0 for each packed example. None if each sequence is one example."""
    index: torch.Tensor
    """Shape (N,): indices into the flattened (B * T) positions at which logits are computed, because the next token is
    supervised. Computing only these logits saves most of a small model's work."""
    targets: torch.Tensor
    """Shape (N,): the target token at each of these positions."""
    dropout_keys: torch.Tensor
    """Shape (B, T): for each token the key from which dropout derives its mask, see `dropout_seed`."""
    tokens: int
    """Number of supervised tokens; 0 for a dummy micro-batch, whose single target is IGNORED."""
    real_tokens: int
    """Number of tokens that are not padding."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with all tensors copied to ``device``."""
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True) if self.position_ids is not None else None,
            index=self.index.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            dropout_keys=self.dropout_keys.to(device, non_blocking=True),
        )


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the dropout seed (63 bits) of one row in one optimizer step, derived from the run's ``seed``, ``step`` and
    ``row`` only. Therefore no random state has to be saved, and ranks, micro-batches and packing do not change which
    activations are dropped."""
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def collate(
    sequences: Sequence[Sequence[tuple[Example, int]]],
    *,
    pad: int,
    packed: bool,
) -> Batch:
    """Return the tensors of ``sequences``. Each sequence is one example or several packed examples, and each example
    comes with its dropout seed.

    Without sequences, return a dummy micro-batch of weight 0. Under ZeRO, all ranks must compute the same number of
    micro-batches, even if a rank has no examples left.
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
                # The logits at position t predict token t + 1, so the first token of an example has no position that
                # predicts it.
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
