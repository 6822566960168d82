"""The loss inside of the output head: logits are computed for supervised positions only, and a chunk of positions at a
time.

`objective.py` puts a `LossHead` on a model. The logits of a whole batch (batch x length x vocabulary in fp32) would be
the largest tensor of a training step. So `LossHead` replaces the head's `forward` with a function that picks the
positions that have a target, and sums the loss of one chunk of positions before it computes the logits of the next
chunk. The gradients of a plain linear head are computed while the logits of a chunk are in memory
(`linear_head.py`). For a head with an adapter, the logits of each chunk are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finetune_trainer.data.batches import IGNORED, Batch
from finetune_trainer.loss.dropout import DropoutKeys
from finetune_trainer.loss.linear_head import linear_head_loss

CHUNK_LOGITS = 1 << 25
"""Number of logits that are computed at a time, in one chunk of positions: 128 MiB in fp32."""
CPU_CHUNK_LOGITS = 1 << 22
"""Number of logits that are computed at a time for a frozen output head on the CPU. A chunk that fits into the cache is
faster there. Small chunks cost no second computation, because the logits of a frozen head are not computed again in the
backward pass."""


class LossHead:
    """A model's output head that can return the summed loss of a batch instead of logits."""

    def __init__(
        self,
        head: nn.Module,
        keys: DropoutKeys,
        *,
        vocabulary: int,
        chunk_logits: int = CHUNK_LOGITS,
        fused: bool = True,
    ) -> None:
        """Replace the forward function of ``head``. ``keys`` are the dropout keys for a LoRA adapter on the head.
        Without ``fused``, no gradients are computed in the forward pass."""
        self.module = head
        # The gradients are those of torch's linear layer, so no other forward function may compute the logits.
        self._is_linear = fused and type(head) is nn.Linear and "forward" not in vars(head)
        self._logits = head.forward
        self.keys = keys
        self._vocabulary = vocabulary
        self._chunk_rows = max(1, chunk_logits // vocabulary)
        self.batch: Batch | None = None
        """The batch whose loss `forward` returns. While it is None, `forward` returns logits, as generation needs
        them."""
        self.factor = 1.0
        """What the caller will multiply the batch's loss by, as at `linear_head_loss`."""
        self.excluded: torch.Tensor | None = None
        """Ids of the tokens that get no probability, as a tensor on the model's device. None where no token is
        excluded."""
        head.forward = self._forward

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the summed loss of the batch, a scalar in nats and fp32, or the logits where no batch is set.
        ``hidden`` (B, T, H) holds the last hidden states."""
        batch = self.batch
        if batch is None:
            return self._logits(hidden, *args, **kwargs)
        chosen = hidden.flatten(0, 1)[batch.index]
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        if self._is_linear and (trained or chosen.requires_grad) and _computes_gradients():
            small = chosen.device.type == "cpu" and not trained
            rows = max(1, CPU_CHUNK_LOGITS // self._vocabulary) if small else self._chunk_rows
            return linear_head_loss(
                chosen, self.module, batch.targets, excluded=self.excluded, chunk_rows=rows, factor=self.factor
            )
        pieces = [
            tensor.split(self._chunk_rows)
            for tensor in (chosen, batch.targets, batch.dropout_keys.flatten()[batch.index])
        ]
        chunks = list(zip(*pieces, strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.stack([self._nll(*chunk) for chunk in chunks]).sum()
        # The logits of each chunk are computed again in the backward pass. Otherwise the logits of all chunks would
        # stay in memory until then.
        sums = [checkpoint(self._nll, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(sums).sum()

    def _nll(self, hidden: torch.Tensor, targets: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        self.keys.value = keys
        logits = exclude_from_logits(self._logits(hidden).float(), self.excluded)
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _computes_gradients() -> bool:
    """Return whether gradients are computed, and not under autocast, which chooses the types of each operator."""
    return torch.is_grad_enabled() and not any(map(torch.is_autocast_enabled, ("cuda", "cpu")))


def exclude_from_logits(logits: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
    """Return ``logits`` (N, V) with minus infinity for the tokens ``excluded``, so that a softmax is over the other
    tokens only."""
    return logits if excluded is None else logits.index_fill(1, excluded, float("-inf"))
