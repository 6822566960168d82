"""Turns a causal language model into a function from a batch to the summed loss of its supervised tokens.

`engine/engine.py` makes one objective for each engine. The model stays a transformers or peft model. Outside of
`Objective.loss` the model returns logits, so that it can still generate text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune_trainer.data.batches import IGNORED, Batch
from finetune_trainer.loss.dropout import DropoutKeys, ExampleDropout
from finetune_trainer.loss.head import LossHead, exclude_from_logits
from finetune_trainer.model.packed_attention import note_borders


class Objective:
    """The loss of a model. An objective must be made before DeepSpeed's engine of the model."""

    def __init__(self, model: nn.Module, *, fused_head: bool = True) -> None:
        """Replace the forward function of the model's output head, and the dropout of the model's LoRA adapters.
        ``model`` is a PreTrainedModel or a PeftModel. ``fused_head`` is explained at `LossHead`."""
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._body_keys, head_keys = DropoutKeys(), DropoutKeys()
        head = inner.get_output_embeddings()
        in_head = set(head.modules()) if head is not None else set()
        for name, module in model.named_modules():
            for child_name, child in module.named_children():
                if isinstance(child, nn.Dropout) and "lora_dropout" in name:
                    keys = head_keys if module in in_head else self._body_keys
                    setattr(module, child_name, ExampleDropout(child.p, f"{name}.{child_name}", keys))
        vocabulary = inner.config.get_text_config().vocab_size
        self._head = LossHead(head, head_keys, vocabulary=vocabulary, fused=fused_head) if head is not None else None
        self._excluded: torch.Tensor | None = None
        self.full_logits = self._head is None
        """Whether `loss` computes the logits of all positions first, and then the loss. Models that change the logits
        after the head (a soft cap, for example) need this, because a loss computed inside of the head would not see the
        change. Models without an output head need it too."""

    @property
    def head(self) -> nn.Module | None:
        """The output head, None where the model has none. Under ZeRO-3, the engine must gather the head's weights once
        for all chunks of a loss."""
        return self._head.module if self._head is not None else None

    def exclude_tokens(self, tokens: torch.Tensor | None) -> None:
        """Compute losses as if ``tokens``, a tensor of token ids, were not in the vocabulary. None restores the
        vocabulary."""
        self._excluded = tokens
        if self._head is not None:
            self._head.excluded = tokens

    def loss(self, forward: Any, batch: Batch, *, factor: float = 1.0, full_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood of the supervised tokens of ``batch``, a scalar in nats and fp32.
        ``forward`` calls the model. ``factor`` is what the caller will multiply the loss by before the backward pass:
        the result and its gradients don't depend on it, but the rounding of the gradients does (`linear_head_loss`)."""
        if self._head is None or self.full_logits or full_logits:
            logits = exclude_from_logits(self.logits(forward, batch).float(), self._excluded)
            return nn.functional.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")
        self._head.batch, self._head.factor = batch, factor
        try:
            return forward(**self._inputs(batch)).logits
        finally:
            self._head.batch = None

    def logits(self, forward: Any, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) at the N positions of ``batch`` that predict a target. The model computes
        the logits of all positions."""
        if self._head is not None:
            self._head.keys.value = batch.dropout_keys
        return forward(**self._inputs(batch)).logits.flatten(0, 1)[batch.index]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        self._body_keys.value = batch.dropout_keys
        batch_size, length = batch.input_ids.shape
        note_borders(batch.starts, batch.longest, shape=(batch_size, length))
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is not None:
            # transformers finds the borders of packed examples in `position_ids`, but only where neither an attention
            # mask nor a KV cache is passed. Otherwise packed examples would attend to each other.
            inputs["position_ids"] = batch.position_ids
        return inputs
