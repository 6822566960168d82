"""The modules of a base model without its weights: a model on torch's meta device, built from `config.json`.

`base_check.py`, for example, uses the structure to choose LoRA's target modules and to check the weight files, and
`reporting/meter.py` uses it to count FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_core.errors import UserError
from finetune_trainer.model.configuration import load_configuration, model_context, read_configuration
from finetune_trainer.pod.errors import library_boundary
from finetune_trainer.pod.faulty_field import explained
from finetune_trainer.pod.model_file_names import CONFIG_FILE


@dataclass(frozen=True)
class ModelStructure:
    """The modules of a model, as its configuration describes them, without any weight."""

    model: Any
    """The transformers model on the meta device."""
    input_name: str
    """Module name of the input embedding, for example `model.embed_tokens`."""
    output_name: str | None
    """Module name of the output head, for example `lm_head`; None where the model has no head."""
    tied: bool
    """Whether input embedding and output head share one weight."""
    rows: int
    """Number of rows of the input embedding. Every token id of a text must be smaller than this number."""
    context: int | None
    """Length in tokens of the longest text that the model can read; None where the configuration has no limit."""


def read_structure(folder: Path) -> ModelStructure:
    """Return the structure of the model in ``folder``. Raises UserError where the folder holds no causal language
    model.

    Side effect: unsets transformers' DeepSpeed configuration. An earlier run in this process may have left the
    configuration set, with which every new model would be sharded (ZeRO-3). So call this function before
    `shard_new_models` sets the configuration for this run's model.
    """
    unset_hf_deepspeed_config()
    config = load_configuration(folder, "model")
    # A wrong file can make the code of transformers raise any exception.
    with library_boundary(
        lambda error: UserError(
            "model", f"its files can't be loaded: {explained(folder, [CONFIG_FILE], _build, error, smaller=True)}"
        )
    ):
        model = _skeleton(config)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = config.get_text_config()
    return ModelStructure(
        model=model,
        input_name=names[id(inner)],
        output_name=names[id(head)] if head is not None else None,
        tied=head is not None and (head.weight is inner.weight or bool(getattr(text, "tie_word_embeddings", False))),
        rows=int(inner.weight.shape[0]),
        context=model_context(config),
    )


def _build(folder: Path) -> Any:
    return _skeleton(read_configuration(folder))


def _skeleton(config: Any) -> Any:
    """Return the model with the configuration ``config`` on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
