"""Loads the base model from local files and puts the adapters on; called by every rank.

Adapter weights come from (seed, name) on the CPU in fp32: the same for every stage, rank count and device.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_trainer.errors import first_line

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALL_DENSE_LAYERS = "all-linear"
"""peft's name for every linear layer but the output head."""


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model; raises UserError where its files don't make a causal language model."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError("model", f"its files can't be loaded: {first_line(error)}") from error
    model.config.use_cache = False
    return model


def add_adapters(model: PreTrainedModel, lora: LoRASpec, *, seed: int, base_name: str) -> PeftModel:
    """Put LoRA adapters on ``model``; raises UserError where a target module does not exist.

    ``base_name`` is what `adapter_config.json` names as the base.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        target_modules=list(lora.target_modules) or ALL_DENSE_LAYERS,
        task_type="CAUSAL_LM",
    )
    try:
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError("lora.targetModules", f"must name modules of the model: {first_line(error)}") from error
    # Otherwise it is the folder that this pod fetched the base to, which means nothing to anybody else.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
            parameter.data.copy_(initial_adapter(name, parameter.shape, seed))
    return tuned


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the first value of an adapter's weight: B is zero, A is uniform as in Kaiming's rule with a = sqrt(5)
    (what peft and the paper's code use), so that the first update starts from the base model."""
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; needs gradients at the input where the embedding is frozen."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name and in the model's order (tied ones once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
