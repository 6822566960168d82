"""Turns a downloaded checkpoint into the artifact that the job publishes: a LoRA adapter that peft loads, or a model
that transformers loads.

`finish.py` calls `export_artifact` on rank 0 only; no other rank takes part. The weights are read from the checkpoint's
files, whose sha256 was verified, and not from the model in memory. The published values of the trained weights are
therefore those that the bucket holds, rounded to the precision of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune_core.api.storage import Export
from finetune_trainer.checkpoints.weight_deltas import WeightDelta, adapter_changes
from finetune_trainer.engine.engine import MASTER
from finetune_trainer.engine.state import stored_tensors
from finetune_trainer.model.added_rows import AddedRows, check_mergeable, read_added_rows
from finetune_trainer.model.load import DTYPES
from finetune_trainer.model.weight_files import WeightFiles, write_index
from finetune_trainer.pod.model_file_names import INDEX_FILE

ADAPTER_FILE = "adapter_model.safetensors"
NEW_ROWS_FILE = "new_embeddings.safetensors"
"""File in an adapter's folder that holds the embedding rows of the added tokens. The file name and the tensor names are
those of Anyscale's and IBM's tools. With this file the adapter can be used without the extended base model, a copy of
the base model that has these rows."""
MERGED_FOLDER = "merged"
LARGEST_FILE = "5GB"
"""Largest size of one weights file of a full run's artifact. `save_torch_state_dict` splits a larger model into several
files. A merged model is split like its base model."""


@dataclass(frozen=True)
class ExportOptions:
    """Which kind of artifact to make, and of which base model."""

    kind: Export
    """What a LoRA run exports: `Adapter`, `Merged` (the merged model) or `Both`. A full run ignores the field and
    exports its model."""
    precision: str
    """Data type that the engine computed with, `bf16` or `fp32`. The exported weights are rounded to the same type."""
    base: Path
    """Local folder of the base model that the run trained. Where the run extended the base model, for example by added
    tokens, this is the extended copy."""
    base_name: str
    """Name or address of the base model, which is written into `adapter_config.json`, for example
    `meta-llama/Llama-2-7b-hf`."""
    added_rows: AddedRows | None
    """Where the embedding rows of added tokens lie in the files of `base`; None without added tokens."""
    stop_ids: Sequence[int]
    """Token ids that end a generated text."""


def export_artifact(
    model: Any, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, target: Path, options: ExportOptions
) -> list[Path]:
    """Write the artifact of the checkpoint in folder ``checkpoint`` into the folder ``target``, and return the written
    files.

    With kind `Both` the merged model lies in the subfolder `merged`. ``model`` provides names and configuration only;
    no weight is read from it.
    """
    target.mkdir(parents=True)
    dtype = DTYPES[options.precision]
    weights = {name: tensors[MASTER].to(dtype) for name, tensors in stored_tensors(checkpoint, (MASTER,))}
    if not isinstance(model, PeftModel):
        save_torch_state_dict(weights, str(target), max_shard_size=LARGEST_FILE)
        _save_configuration(model, target, dtype, options.stop_ids)
        tokenizer.save_pretrained(target)
    if isinstance(model, PeftModel) and options.kind in ("Adapter", "Both"):
        _save_adapter(model, weights, target, options.base_name)
        if options.added_rows is not None:
            save_file(
                read_added_rows(options.base, options.added_rows, dtype), target / NEW_ROWS_FILE, {"format": "pt"}
            )
        tokenizer.save_pretrained(target)
    if isinstance(model, PeftModel) and options.kind in ("Merged", "Both"):
        folder = target / MERGED_FOLDER if options.kind == "Both" else target
        folder.mkdir(exist_ok=True)
        _save_merged(WeightFiles.of(options.base), adapter_changes(model, weights), folder, dtype)
        _save_configuration(model.get_base_model(), folder, dtype, options.stop_ids)
        tokenizer.save_pretrained(folder)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], target: Path, base_name: str) -> None:
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, target / ADAPTER_FILE, {"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    # The names are sorted so that the same run always writes the same bytes. peft keeps the names in a set, whose order
    # differs between processes.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(target))


def _save_merged(base: WeightFiles, changes: Mapping[str, WeightDelta], target: Path, dtype: torch.dtype) -> None:
    """Write the merged model into the folder ``target``: the weights of ``base`` plus ``changes``, added in fp32 and
    then rounded to ``dtype``. Only one weights file is in memory at a time."""
    check_mergeable(list(changes), base.folder)
    for name in sorted(set(base.files.values())):
        merged = {}
        with safe_open(base.folder / name, framework="pt") as file:
            for key in sorted(key for key, place in base.files.items() if place == name):
                weight = file.get_tensor(key)
                merged[key] = (changes[key].applied_to(weight) if key in changes else weight).to(dtype).contiguous()
        save_file(merged, target / name, {"format": "pt"})
    if (base.folder / INDEX_FILE).is_file() or len(set(base.files.values())) > 1:
        write_index(target, base.files)


def _save_configuration(model: Any, target: Path, dtype: torch.dtype, stop_ids: Sequence[int]) -> None:
    config = model.config
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        model.generation_config.save_pretrained(target)
