"""Chooses the modules that get a LoRA adapter, and adds the adapters. Every rank calls these functions through
`preparation.py`.

The initial weights of an adapter depend on (seed, parameter name) only, and are drawn in fp32 on the CPU. They are
therefore the same at every ZeRO stage, on any number of ranks and on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.pod.errors import first_line


def adapted_modules(structure: ModelStructure, lora: LoRASpec, *, added_tokens: bool) -> list[str]:
    """Return the names of the modules that get an adapter, in peft's short form, for example `q_proj`.

    Where the job names modules, these are returned. Otherwise the result is all dense layers of the decoder, and also
    both embeddings where the job adds tokens. Raises UserError where a name in `lora.targetModules` fits no module.
    """
    embeddings = [name for name in (structure.input_name, structure.output_name) if name is not None]
    adaptable = {
        name
        for name, module in structure.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding)
    }
    if lora.target_modules:
        for target in lora.target_modules:
            if not any(_fits(name, target) for name in adaptable):
                endings = sorted({name.rpartition(".")[2] for name in adaptable})
                raise UserError(
                    "lora.targetModules",
                    f"must name modules of the model, and {target!r} is none; it has {', '.join(endings[:20])}",
                )
        return sorted(lora.target_modules)
    dense = {
        name.rpartition(".")[2]
        for name, module in structure.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in embeddings
    }
    return sorted({*dense, *(name.rpartition(".")[2] for name in embeddings if added_tokens)})


def _fits(name: str, target: str) -> bool:
    """Return whether peft adds an adapter to the module ``name`` when its `target_modules` contain ``target``."""
    return name == target or name.endswith(f".{target}")


def adapted(structure: ModelStructure, targets: Collection[str]) -> list[str]:
    """Return the full names of the modules that ``targets`` select, for example `model.layers.0.self_attn.q_proj`."""
    return [
        name
        for name, module in structure.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding)
        and any(_fits(name, target) for target in targets)
    ]


def adapts_an_embedding(structure: ModelStructure, targets: Collection[str]) -> bool:
    """Return whether ``targets`` select the input embedding or the output head."""
    embeddings = [name for name in (structure.input_name, structure.output_name) if name is not None]
    return any(_fits(name, target) for name in embeddings for target in targets)


def add_adapters(
    model: PreTrainedModel, lora: LoRASpec, *, targets: Sequence[str], seed: int, base_name: str
) -> PeftModel:
    """Add LoRA adapters to the modules ``targets`` of ``model``.

    ``base_name`` is the base model's name for `adapter_config.json`.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError("lora.targetModules", f"must name modules of the model: {first_line(error)}") from error
    # Replace peft's default, the local folder of the base model, which means nothing outside of this pod.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
            parameter.data.copy_(initial_adapter(name, parameter.shape, seed))
    return tuned


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the initial value of an adapter's weight in fp32. The product B @ A of an adapter is zero at first.

    For a dense layer B is zero, and A is uniform with bound 1 / sqrt(columns): Kaiming's rule with a = sqrt(5), as in
    peft and in the code of the LoRA paper (Hu et al., 2021). For an embedding A is zero and B is normally distributed,
    as in peft.
    """
    embedding = "lora_embedding_" in name
    if ("lora_embedding_A" in name) if embedding else ("lora_B" in name):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    if embedding:
        return torch.empty(shape).normal_(generator=generator)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
