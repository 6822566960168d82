"""Loads the base model from local files and puts the adapters on; called by every rank.

Adapter weights come from (seed, name) on the CPU in fp32: the same for every stage, rank count and device.
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
from finetune_trainer.model.mmap_memory import letting_go
from finetune_trainer.model.structure import Skeleton
from finetune_trainer.pod.errors import first_line

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def adapted_modules(bones: Skeleton, lora: LoRASpec, *, added_tokens: bool) -> list[str]:
    """Return the names of the modules that get an adapter, as short as peft understands them.

    Without a choice of the job's: every dense layer of the decoder, and both embeddings where tokens are added.
    Raises UserError where a name that the job gives fits no module.
    """
    embeddings = [name for name in (bones.input_name, bones.output_name) if name is not None]
    adaptable = {
        name
        for name, module in bones.model.named_modules()
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
        for name, module in bones.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in embeddings
    }
    return sorted({*dense, *(name.rpartition(".")[2] for name in embeddings if added_tokens)})


def _fits(name: str, target: str) -> bool:
    """Whether peft takes module ``name`` for ``target``."""
    return name == target or name.endswith(f".{target}")


def adapted(bones: Skeleton, targets: Collection[str]) -> list[str]:
    """Return the full names of the modules that get an adapter."""
    return [
        name
        for name, module in bones.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding)
        and any(_fits(name, target) for target in targets)
    ]


def adapts_an_embedding(bones: Skeleton, targets: Collection[str]) -> bool:
    """Whether one of ``targets`` is the input embedding or the output head."""
    embeddings = [name for name in (bones.input_name, bones.output_name) if name is not None]
    return any(_fits(name, target) for name in embeddings for target in targets)


def load_base(folder: Path, dtype: torch.dtype, *, sharded: bool = False) -> PreTrainedModel:
    """Load the base model; raises UserError where its files don't make a whole causal language model.

    ``sharded``: its weights are copied into the shards of the ranks, so none of the files' pages is needed twice.
    """
    try:
        with letting_go(folder) if sharded else contextlib.nullcontext():
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
    shared = {key for key, _ in getattr(model, "all_tied_weights_keys", {}).items()}
    missing = sorted(key for key in report["missing_keys"] if key not in shared)
    if missing:
        # transformers would go on with random values.
        raise UserError("model", f"its files are incomplete: they lack {len(missing)} weights, such as {missing[0]}")
    model.config.use_cache = False
    return model


def add_adapters(
    model: PreTrainedModel, lora: LoRASpec, *, targets: Sequence[str], seed: int, base_name: str
) -> PeftModel:
    """Put LoRA adapters on the modules ``targets`` of ``model``.

    ``base_name`` is what `adapter_config.json` names as the base.
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
    # Otherwise it is the folder that this pod fetched the base to, which means nothing to anybody else.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
            parameter.data.copy_(initial_adapter(name, parameter.shape, seed))
    return tuned


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the first value of an adapter's weight: what it adds to the base is zero at first.

    Of a dense layer B is zero and A is uniform as in Kaiming's rule with a = sqrt(5), what peft and the paper's code
    use. Of an embedding peft has it the other way round: A is zero and B normal.
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
    """Recompute activations in the backward pass; needs gradients at the input where the embedding is frozen."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name and in the model's order (tied ones once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
