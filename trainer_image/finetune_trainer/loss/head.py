"""The output head under the loss: logits of supervised positions only, in chunks, never for the whole batch.

The logits of a batch are the largest tensor of a training step (batch x length x vocabulary in fp32). The head's own
`forward` is replaced by one that picks the positions with a target, and turns a chunk of logits into a sum before the
next chunk is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finetune_trainer.data.batches import IGNORED, Batch
from finetune_trainer.loss.dropout import DropoutKeys
from finetune_trainer.loss.kernels import frozen_head_loss

CHUNK_LOGITS = 1 << 25
"""Logits of a chunk: 128 MiB in fp32."""
CPU_CHUNK_LOGITS = 1 << 22
"""Of a frozen head on the CPU, where a chunk that stays in the cache is passed over faster; there nothing is computed
twice however many chunks there are."""


class LossHead:
    """A model's output head that can return the summed loss of a batch in place of logits."""

    def __init__(
        self, head: nn.Module, keys: DropoutKeys, *, vocabulary: int, chunk_logits: int = CHUNK_LOGITS
    ) -> None:
        """Take over ``head``'s forward; ``keys`` are those of its own dropout."""
        self.module = head
        self._logits = head.forward
        self.keys = keys
        self._vocabulary = vocabulary
        self._chunk_rows = max(1, chunk_logits // vocabulary)
        self.batch: Batch | None = None
        """The batch whose loss is wanted; None: logits are, as for generation."""
        self.hidden: torch.Tensor | None = None
        """Tokens that the model is to be without, on the device: they get no probability."""
        head.forward = self._forward

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return logits, or the batch's summed loss (a scalar, nats, fp32) of ``hidden`` (B, T, H)."""
        batch = self.batch
        if batch is None:
            return self._logits(hidden, *args, **kwargs)
        chosen = hidden.flatten(0, 1)[batch.index]
        if self._is_frozen and chosen.requires_grad:
            rows = max(1, CPU_CHUNK_LOGITS // self._vocabulary) if chosen.device.type == "cpu" else self._chunk_rows
            return frozen_head_loss(chosen, self.module, batch.targets, removed=self.hidden, chunk_rows=rows)
        pieces = [
            tensor.split(self._chunk_rows)
            for tensor in (chosen, batch.targets, batch.dropout_keys.flatten()[batch.index])
        ]
        chunks = list(zip(*pieces, strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.stack([self._nll(*chunk) for chunk in chunks]).sum()
        # Computed again in the backward pass, or the logits of all chunks would be kept for it.
        sums = [checkpoint(self._nll, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(sums).sum()

    @property
    def _is_frozen(self) -> bool:
        """Whether the head is a plain layer that is not trained: most LoRA runs."""
        parameters = self.module.parameters()
        return type(self.module) is nn.Linear and not any(parameter.requires_grad for parameter in parameters)

    def _nll(self, hidden: torch.Tensor, targets: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        self.keys.value = keys
        logits = without(self._logits(hidden).float(), self.hidden)
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def without(logits: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Return ``logits`` (N, V) with those of ``hidden`` tokens at minus infinity: a softmax over the others."""
    return logits if hidden is None else logits.index_fill(1, hidden, float("-inf"))
