"""Turns a causal language model into a function from a batch to its summed loss: loss head, keys of dropout.

The model stays what transformers and peft know: without a batch it computes logits, and can generate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune_trainer.data.batches import IGNORED, Batch
from finetune_trainer.loss.dropout import DropoutKeys, ExampleDropout
from finetune_trainer.loss.head import LossHead, without


class Objective:
    """The loss of a model; made before the model is sharded."""

    def __init__(self, model: nn.Module) -> None:
        """Take over head and adapter dropout of ``model`` (a PreTrainedModel or PeftModel)."""
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
        self._head = LossHead(head, head_keys, vocabulary=vocabulary) if head is not None else None
        self._hidden: torch.Tensor | None = None
        self.whole_logits = self._head is None
        """Compute the logits of all positions first: for models that change them after the head (a soft cap), which
        a loss inside of the head would not see."""

    @property
    def head(self) -> nn.Module | None:
        """The output head; ZeRO-3 has to gather it once for all chunks."""
        return self._head.module if self._head is not None else None

    def hide(self, tokens: torch.Tensor | None) -> None:
        """Compute losses as if the vocabulary were without ``tokens``."""
        self._hidden = tokens
        if self._head is not None:
            self._head.hidden = tokens

    def loss(self, forward: Any, batch: Batch, *, whole_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood (nats, fp32) of ``batch``; ``forward`` runs the model."""
        if self._head is None or self.whole_logits or whole_logits:
            logits = without(self.logits(forward, batch).float(), self._hidden)
            return nn.functional.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")
        self._head.batch = batch
        try:
            return forward(**self._inputs(batch)).logits
        finally:
            self._head.batch = None

    def logits(self, forward: Any, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) that predict the targets of ``batch``, out of those of all positions."""
        if self._head is not None:
            self._head.keys.value = batch.dropout_keys
        return forward(**self._inputs(batch)).logits.flatten(0, 1)[batch.index]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        self._body_keys.value = batch.dropout_keys
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is not None:
            # With a cache, or with a mask, packed examples would see each other.
            inputs["position_ids"] = batch.position_ids
        return inputs
