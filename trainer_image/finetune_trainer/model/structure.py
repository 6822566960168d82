"""Structure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line


@dataclass(frozen=True)
class Skeleton:
    """What a model's configuration tells about its modules, without any weight."""

    model: Any
    """On the meta device."""
    input_name: str
    """Module name of the input embedding, such as `model.embed_tokens`."""
    output_name: str | None
    """Module name of the output head, such as `lm_head`."""
    tied: bool
    """Both share one weight."""
    context: int | None
    """Longest text that the model reads, in tokens."""


def skeleton(folder: Path) -> Skeleton:
    """Return the skeleton of the model in ``folder``; raises UserError where it is no causal language model.

    Comes before the model is loaded: it ends ZeRO-3's sharding of new models (of a run before in this process).
    """
    unset_hf_deepspeed_config()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError("model", f"its files can't be loaded: {first_line(error)}") from error
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = config.get_text_config()
    return Skeleton(
        model=model,
        input_name=names[id(inner)],
        output_name=names[id(head)] if head is not None else None,
        tied=head is not None and (head.weight is inner.weight or bool(getattr(text, "tie_word_embeddings", False))),
        context=getattr(text, "max_position_embeddings", None),
    )
