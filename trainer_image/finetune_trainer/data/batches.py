"""Builds the tensors of a micro-batch: the token ids of its sequences, padded on the right, and the target token of
each position that has a loss. `micro_batches.py` and the checks of the engine (`engine/checks.py`) call `collate`.

No attention mask is built. Padding needs no mask, because it is on the right, and with causal attention a token can't
attend to a token on its right. Packed examples are kept apart by their position ids and by their borders
(`model/packed_attention.py`). With a mask of ones, transformers would no longer look for borders in the position ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from finetune_trainer.data.examples import Example

IGNORED = -100
"""Target of a position without loss, as in `torch.nn.functional.cross_entropy`."""
POSITION_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""Factor by which the position of a token is multiplied, so that small positions spread over all 64 bits of the dropout
keys (Knuth's multiplicative hashing: 2^64 divided by the golden ratio). 2^64 is subtracted, so that the factor is a
signed 64-bit number, as torch has them."""


class Batch(NamedTuple):
    """A micro-batch: B sequences, padded to T tokens. N of the tokens are supervised."""

    input_ids: torch.Tensor
    """Token ids of shape (B, T), padded on the right."""
    position_ids: torch.Tensor | None
    """Positions of shape (B, T), which restart at 0 for each packed example. None without packing, where each sequence
    is one example."""
    index: torch.Tensor
    """Shape (N,): the position right before each supervised token, as an index into the B * T positions of the
    flattened batch. The loss needs logits at these positions only, and `LossHead` computes no others unless full logits
    are asked for (see `Objective.loss`)."""
    targets: torch.Tensor
    """Shape (N,): the supervised token that follows each position of `index`."""
    dropout_keys: torch.Tensor
    """Shape (B, T): a 64-bit key for each token, from which dropout derives its mask. The key mixes the example's
    `dropout_seed` with the token's position in the example."""
    tokens: int
    """Number of supervised tokens. 0 for a dummy micro-batch, whose only target is IGNORED."""
    real_tokens: int
    """Number of tokens that are not padding. 1 for a dummy micro-batch, although its only token is padding."""
    starts: torch.Tensor | None = None
    """Shape (S + 1,), int32: the first token of each of S packed examples in the flattened B * T positions, and B * T.
    The padding at the end of a sequence counts as an example. None without packing."""
    longest: int = 0
    """Number of tokens of the longest example in `starts`, where padding counts as an example too. 0 without
    packing."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch, whose tensors must be on the CPU, with all tensors on ``device``. For the CPU nothing is
        copied. Copies to a GPU are only issued: the CPU does not wait until the GPU makes them."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{name: _on(device, tensor) for name, tensor in tensors.items()})


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # Without pinned memory the CPU would wait until the GPU has come to the copy. torch keeps pinned memory for later
    # micro-batches, and uses it again only after the GPU has copied what it holds. The copy is in the order of the
    # computation, and not on a stream of its own, because the few hundred kilobytes of a micro-batch are copied within
    # microseconds.
    return tensor.pin_memory().to(device, non_blocking=True)


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the dropout seed (63 bits) of one row in one optimizer step. The seed depends only on the run's ``seed``,
    on ``step`` and on ``row``. So no state of a random generator has to be saved, and the dropped activations stay the
    same with other ranks, micro-batches or packing."""
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def collate(
    sequences: Sequence[Sequence[tuple[Example, int]]],
    *,
    pad: int,
    packed: bool,
) -> Batch:
    """Return the tensors of ``sequences``. Each sequence is a list of pairs of an example and its dropout seed.
    ``packed`` says whether a sequence may have several examples. ``pad`` is the token id of padding.

    Without sequences, return a dummy micro-batch of one padding token without loss. Under ZeRO all ranks must compute
    the same number of micro-batches, so a rank that has no examples left computes the dummy.
    """
    if not sequences:
        one, none = torch.full((1, 1), pad), torch.zeros(1, dtype=torch.long)
        batch = Batch(one, None, none, torch.full((1,), IGNORED), torch.zeros_like(one), 0, 1)
        if not packed:
            return batch
        borders = torch.tensor([0, 1], dtype=torch.int32)
        return batch._replace(position_ids=torch.zeros_like(one), starts=borders, longest=1)
    totals = [sum(len(example.ids) for example, _ in sequence) for sequence in sequences]
    longest = max(totals)
    input_ids = torch.full((len(sequences), longest), pad)
    position_ids = torch.zeros_like(input_ids)
    dropout_keys = torch.zeros_like(input_ids)
    index: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    starts: list[int] = []
    for line, sequence in enumerate(sequences):
        start = 0
        for example, seed in sequence:
            ids = torch.from_numpy(np.array(example.ids, dtype=np.int64))
            end = start + len(ids)
            starts.append(line * longest + start)
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
        if start < longest:
            starts.append(line * longest + start)
    starts.append(input_ids.numel())
    supervised = torch.cat(targets)
    return Batch(
        input_ids,
        position_ids if packed else None,
        torch.cat(index),
        supervised,
        dropout_keys,
        len(supervised),
        sum(totals),
        torch.tensor(starts, dtype=torch.int32) if packed else None,
        max(end - start for start, end in pairwise(starts)) if packed else 0,
    )
