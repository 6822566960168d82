"""Loads the base model from local files. Every rank calls these functions through `preparation.py`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_core.errors import UserError
from finetune_trainer.model.mmap_memory import release_mapped_pages
from finetune_trainer.pod.errors import first_line

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(folder: Path, dtype: torch.dtype, *, sharded: bool = False) -> PreTrainedModel:
    """Load the base model. Raises UserError where its files are not those of a complete causal language model.

    With ``sharded`` (ZeRO-3) the weights are copied from memory-mapped files into the shards of the ranks. While this
    happens, the memory of the mapped files is freed again and again.
    """
    try:
        with release_mapped_pages(folder) if sharded else contextlib.nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError("model", f"its files can't be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        # torch raises RuntimeError for lack of memory and for lost ranks too, which are not the model's fault.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError("model", "its config.json does not fit its weights: they have other shapes") from error
    shared = {key for key, _ in getattr(model, "all_tied_weights_keys", {}).items()}
    missing = sorted(key for key in report["missing_keys"] if key not in shared)
    if missing:
        # This is an error here, because transformers gives missing weights random values and only warns.
        raise UserError("model", f"its files are incomplete: they lack {len(missing)} weights, such as {missing[0]}")
    model.config.use_cache = False
    return model


def enable_gradient_checkpointing(model: Any) -> None:
    """Let ``model`` compute activations again in the backward pass instead of storing them. For this, the output of the
    input embedding is made to require a gradient, even where the embedding is frozen."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name, in the model's order. A tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
