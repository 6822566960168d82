"""Makes the artifact of a fetched checkpoint: an adapter that peft loads, or a model that transformers loads.

It is made of the verified bytes of the checkpoint and not of what the process has in memory: what is published is
what can be resumed from. Rank 0 only, no collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune_trainer.engine.engine import MASTER
from finetune_trainer.engine.state import stored_tensors
from finetune_trainer.model.added_rows import NewRows, check_mergeable, new_rows
from finetune_trainer.model.load import DTYPES
from finetune_trainer.model.weight_files import INDEX, Weights, write_index

ADAPTER_FILE = "adapter_model.safetensors"
NEW_ROWS_FILE = "new_embeddings.safetensors"
"""The rows of added tokens, under the names that Anyscale's and IBM's tools write: with them an adapter is complete
without the extended base."""
MERGED_FOLDER = "merged"
PEFT_PREFIX = "base_model.model."
LARGEST_FILE = "5GB"


@dataclass(frozen=True)
class Export:
    """What is made of a checkpoint."""

    kind: Literal["Adapter", "Merged", "Both"]
    """Of a LoRA run; a full run exports its model."""
    precision: str
    """What the engine computed with; weights are rounded to it."""
    base: Path
    """The base model that the run computed with."""
    base_name: str
    """Where anybody finds it, for `adapter_config.json`."""
    new_rows: NewRows | None
    stop_ids: Sequence[int]
    """Tokens that end a generated text."""


def export(
    model: Any, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, target: Path, options: Export
) -> list[Path]:
    """Write the artifact of ``checkpoint`` into ``target`` and return its files; with `Both` the merged model lies in
    a folder of its own. ``model`` gives names and configuration, not weights."""
    target.mkdir(parents=True)
    dtype = DTYPES[options.precision]
    weights = {name: tensors[MASTER].to(dtype) for name, tensors in stored_tensors(checkpoint, (MASTER,))}
    if not isinstance(model, PeftModel):
        save_torch_state_dict(weights, str(target), max_shard_size=LARGEST_FILE)
        _save_configuration(model, target, dtype, options.stop_ids)
        tokenizer.save_pretrained(target)
    if isinstance(model, PeftModel) and options.kind in ("Adapter", "Both"):
        _save_adapter(model, weights, target, options.base_name)
        if options.new_rows is not None:
            save_file(new_rows(options.base, options.new_rows, dtype), target / NEW_ROWS_FILE, {"format": "pt"})
        tokenizer.save_pretrained(target)
    if isinstance(model, PeftModel) and options.kind in ("Merged", "Both"):
        folder = target / MERGED_FOLDER if options.kind == "Both" else target
        folder.mkdir(exist_ok=True)
        _save_merged(Weights.of(options.base), updates(model, weights), folder, dtype)
        _save_configuration(model.get_base_model(), folder, dtype, options.stop_ids)
        tokenizer.save_pretrained(folder)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], target: Path, base_name: str) -> None:
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, target / ADAPTER_FILE, {"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    # peft keeps a set, whose order differs from process to process: the same run must give the same bytes.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(target))


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight of the base: scale * B @ A, of an embedding or a transposed layer its
    transpose."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` with the update, in fp32."""
        delta = self.b.float() @ self.a.float() * self.scale
        return weight.float() + (delta.T if self.transposed else delta)


def updates(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    """Return the updates of ``model``'s adapters by the base's tensor name; ``weights`` are the adapters' values."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        embedding = "default" in module.lora_embedding_A
        a, b = (
            ("lora_embedding_A.default", "lora_embedding_B.default")
            if embedding
            else (
                "lora_A.default.weight",
                "lora_B.default.weight",
            )
        )
        found[f"{name.removeprefix(PEFT_PREFIX)}.weight"] = Update(
            weights[f"{name}.{a}"],
            weights[f"{name}.{b}"],
            module.scaling["default"],
            embedding or bool(getattr(module, "fan_in_fan_out", False)),
        )
    return found


def _save_merged(base: Weights, changes: Mapping[str, Update], target: Path, dtype: torch.dtype) -> None:
    """Write the base with the updates merged in fp32, then rounded: file by file, which is the peak of memory."""
    check_mergeable(list(changes), base.folder)
    for name in sorted(set(base.files.values())):
        merged = {}
        with safe_open(base.folder / name, framework="pt") as file:
            for key in sorted(key for key, place in base.files.items() if place == name):
                weight = file.get_tensor(key)
                merged[key] = (changes[key].added_to(weight) if key in changes else weight).to(dtype).contiguous()
        save_file(merged, target / name, {"format": "pt"})
    if (base.folder / INDEX).is_file() or len(set(base.files.values())) > 1:
        write_index(target, base.files)


def _save_configuration(model: Any, target: Path, dtype: torch.dtype, stop_ids: Sequence[int]) -> None:
    config = model.config
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        model.generation_config.save_pretrained(target)
