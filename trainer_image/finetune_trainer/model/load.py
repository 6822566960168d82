"""Loads the base model from local files and adds LoRA adapters. Every rank calls these functions through
`preparation.py`.

The initial weights of an adapter depend on (seed, parameter name) only, and are drawn in fp32 on the CPU. They are
therefore the same at every ZeRO stage, on any number of ranks and on every device.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_trainer.model.mmap_memory import release_mapped_pages
from finetune_trainer.model.packed_attention import install as install_packed_attention
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.pod.errors import first_line

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    switch_off_dropout(model)
    install_packed_attention()
    return model


def own_dropout(model: torch.nn.Module) -> float:
    """Return the largest rate of dropout that ``model`` has by its own configuration, from 0 to 1."""
    return max((rate for module in model.modules() for rate in _dropout_rates(module).values()), default=0.0)


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set all rates of dropout in ``model`` to zero. torch draws this dropout from a random stream. So no run could be
    repeated, and packed and padded examples would have different losses. The configuration keeps its rates."""
    for module in model.modules():
        for name in _dropout_rates(module):
            setattr(module, name, 0.0)


def _dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the attributes of ``module`` that are rates of dropout above zero."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return {"p": module.p} if module.p > 0 else {}
    # Many models keep the rate as a number, and call a function with it.
    return {
        name: value
        for name, value in vars(module).items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }


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


def enable_gradient_checkpointing(model: Any) -> None:
    """Let ``model`` compute activations again in the backward pass instead of storing them. For this, the output of the
    input embedding is made to require a gradient, even where the embedding is frozen."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name, in the model's order. A tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
