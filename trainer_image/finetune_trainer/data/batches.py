"""Tensors of a micro-batch: right-padded ids, and the targets of the positions that the loss is taken on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from finetune_trainer.data.examples import Example

IGNORED = -100
"""Target of a position without loss, as `torch.nn.functional.cross_entropy` knows it."""


class Batch(NamedTuple):
    """B examples of at most T tokens; K positions of them have a supervised next token in at least one example."""

    input_ids: torch.Tensor
    """(B, T), padded on the right."""
    attention_mask: torch.Tensor
    """(B, T), 1 for tokens and 0 for padding."""
    positions: torch.Tensor
    """(K,): positions whose logits are computed. The head is most of a small model's work."""
    targets: torch.Tensor
    """(B, K): the next token at each of the positions, or IGNORED."""
    tokens: int
    """Supervised tokens: targets that are not IGNORED."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        ids, mask, positions, targets = (tensor.to(device, non_blocking=True) for tensor in self[:4])
        return Batch(ids, mask, positions, targets, self.tokens)


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Return the tensors of ``examples``; of none, a dummy of weight 0 that costs next to nothing.

    Under ZeRO all ranks must compute the same number of micro-batches, whether they have examples or not.
    """
    if not examples:
        one = torch.full((1, 1), pad)
        return Batch(one, torch.ones_like(one), torch.zeros(1, dtype=torch.long), torch.full((1, 1), IGNORED), 0)
    longest = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, prompt_tokens) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        # The logits at position t predict token t + 1. A prompt of no tokens leaves the first one unpredicted.
        first = max(prompt_tokens, 1)
        labels[row, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
    supervised = labels != IGNORED
    positions = supervised.any(dim=0).nonzero().squeeze(1)
    return Batch(input_ids, attention_mask, positions, labels[:, positions], int(supervised.sum()))
