"""Turns a downloaded checkpoint into the artifact that the job publishes: a LoRA adapter that peft loads, or a model
that transformers loads.

`finish.py` calls `export_artifact` on rank 0 only; no other rank takes part. The weights are read from the checkpoint's
files, whose sha256 was verified, and not from the model in memory. The published values of the trained weights are
therefore those that the bucket holds, rounded to the precision of the run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune_core.api.storage import Export
from finetune_core.contract import AdapterOrigin
from finetune_trainer.checkpoints.adapter_changes import adapter_changes
from finetune_trainer.checkpoints.weight_changes import WeightChange, trained_values
from finetune_trainer.engine.engine import MASTER
from finetune_trainer.engine.state import stored_tensors
from finetune_trainer.model.added_rows import AddedRows, read_added_rows
from finetune_trainer.model.configuration import without_kernels
from finetune_trainer.model.generation_config import artifact_generation_config
from finetune_trainer.model.given_adapter import BASE_DIGEST
from finetune_trainer.model.load import DTYPES
from finetune_trainer.model.tensor_names import TensorGroup, TensorNames
from finetune_trainer.model.weight_files import WeightFiles, write_index
from finetune_trainer.pod.model_file_names import ADAPTER_FILE, CONFIG_FILE, SINGLE_FILE

NEW_ROWS_FILE = "new_embeddings.safetensors"
"""File in an adapter's folder that holds the embedding rows of the added tokens. The file name and the tensor names are
those of Anyscale's and IBM's tools. With this file the adapter can be used without the extended base model, a copy of
the base model that has these rows."""
MERGED_FOLDER = "merged"
ORIGIN = "initial_adapter"
"""Key in `auto_mapping` of `adapter_config.json` with the adapter that the training started from, see
`AdapterOrigin`."""


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
    names: TensorNames | None = None
    """Which tensors the files of `base` hold, and which parameters of the model transformers makes of them. None where
    only an adapter is exported."""
    revision: str | None = None
    """Commit, tag or branch of `base_name` on the Hugging Face Hub. None where the base model lies elsewhere."""
    base_sha256: str | None = None
    """sha256 of the base model's weights, as `base_digest` computes it. None where it is not known."""
    origin: AdapterOrigin | None = None
    """The adapter that the training started from. None without one."""


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
    if not isinstance(model, PeftModel):
        _save_model(target, trained_values(checkpoint), tokenizer, options)
    else:
        weights = {name: tensors[MASTER].to(dtype) for name, tensors in stored_tensors(checkpoint, (MASTER,))}
        if options.kind in ("Adapter", "Both"):
            _save_adapter(model, weights, target, options)
            if options.added_rows is not None:
                rows = read_added_rows(options.base, options.added_rows, dtype)
                save_file(rows, target / NEW_ROWS_FILE, {"format": "pt"})
            save_text_files(target, tokenizer, options)
        if options.kind in ("Merged", "Both"):
            folder = target / MERGED_FOLDER if options.kind == "Both" else target
            folder.mkdir(exist_ok=True)
            _save_model(folder, adapter_changes(model, weights), tokenizer, options)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], target: Path, options: ExportOptions) -> None:
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, target / ADAPTER_FILE, {"format": "pt"})
    save_adapter_configuration(model, target, options)


def save_adapter_configuration(model: PeftModel, target: Path, options: ExportOptions) -> None:
    """Write `adapter_config.json` of ``model`` into the folder ``target``."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = options.base_name
    config.revision = options.revision
    if options.base_sha256 is not None:
        base = type(model.get_base_model())
        config.auto_mapping = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
            BASE_DIGEST: options.base_sha256,
        }
        if options.origin is not None:
            config.auto_mapping[ORIGIN] = options.origin.model_dump(mode="json", exclude_none=True)
    # peft keeps the names of the adapted modules in a set, whose order differs between processes. The names are sorted
    # so that the same run always writes the same bytes. An adapter that a job continues may have a regular expression
    # instead of names.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or ())
    config.save_pretrained(str(target))


def save_text_files(target: Path, tokenizer: PreTrainedTokenizerBase, options: ExportOptions) -> Sequence[str]:
    """Write the tokenizer and the generation configuration into the folder ``target``. Return sentences about the
    fields of the base model's generation configuration that had to be repaired or left out."""
    tokenizer.save_pretrained(target)
    vocabulary = max(len(tokenizer), _vocabulary(options.base), *(number + 1 for number in options.stop_ids))
    config, notices = artifact_generation_config(options.base, options.stop_ids, vocabulary=vocabulary)
    config.save_pretrained(target)
    return notices


def _vocabulary(base: Path) -> int:
    """Return the number of tokens that `config.json` of the base model names; 0 where it names none."""
    file = base / CONFIG_FILE
    config = json.loads(file.read_text()) if file.is_file() else {}
    sizes = [part.get("vocab_size") for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def save_model_configuration(target: Path, options: ExportOptions) -> None:
    """Write `config.json` of the base model into the folder ``target``, with the data type of the artifact, and with
    `use_cache` set to true where the file has this field. Fields that name a kernel are left out, so that the artifact
    can be loaded where the kernel is missing. All other fields are left as the base model's publisher wrote
    them, because older programs do not know all fields that transformers would write."""
    config = without_kernels(json.loads((options.base / CONFIG_FILE).read_text()))
    text = config.get("text_config")
    for section in (config, *([text] if isinstance(text, dict) else [])):
        known = [name for name in ("dtype", "torch_dtype") if name in section]
        if section is config or known:
            dtype = str(DTYPES[options.precision]).removeprefix("torch.")
            section.update(dict.fromkeys(known or ["torch_dtype"], dtype))
        if "use_cache" in section:
            section["use_cache"] = True
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _save_model(
    target: Path, changes: Mapping[str, WeightChange], tokenizer: PreTrainedTokenizerBase, options: ExportOptions
) -> None:
    """Apply ``changes``, which have the names of the parameters, to the base model. Write the changed model, with its
    configuration and its tokenizer, into the folder ``target``."""
    assert options.names is not None, "the names of the tensors are needed for a whole model"
    save_weights(WeightFiles.of(options.base), options.names, changes, target, DTYPES[options.precision])
    save_model_configuration(target, options)
    save_text_files(target, tokenizer, options)


def save_weights(
    base: WeightFiles, names: TensorNames, changes: Mapping[str, WeightChange], target: Path, dtype: torch.dtype
) -> None:
    """Apply ``changes`` to the weights in the files ``base``, and write the results as weight files into the folder
    ``target``. The names of the files, and of the tensors in each file, are those of ``base``. Only one weight file,
    and one group of tensors that belong together, is in memory at a time.

    All weights are rounded to ``dtype``, the changed ones after they were computed in fp32. A tensor of which the model
    makes no parameter is copied as it is, and so is a tensor of integers.
    """
    names.check_writable(changes)
    for file_name in sorted(set(base.files.values())):
        inside = sorted(name for name, place in base.files.items() if place == file_name)
        written: dict[str, torch.Tensor] = {}
        for name in inside:
            group = names.group(name)
            if name in written:
                continue
            if group is None:
                written[name] = base.tensor(name)
                continue
            made = _changed_tensors(base, names, group, changes, dtype)
            if made is None:
                weight = base.tensor(name)
                written[name] = weight.to(dtype).contiguous() if weight.is_floating_point() else weight
                continue
            # The tensors may be parts of one larger tensor. Copies of the wanted ones let Python free the larger
            # tensor.
            written |= {key: tensor.clone().contiguous() for key, tensor in made.items() if key in inside}
        save_file(written, target / file_name, {"format": "pt"})
    if set(base.files.values()) != {SINGLE_FILE}:
        write_index(target, base.files)


def _changed_tensors(
    base: WeightFiles, names: TensorNames, group: TensorGroup, changes: Mapping[str, WeightChange], dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """Return the tensors of ``group`` after ``changes``, in ``dtype``, by their names in the files. None where
    ``changes`` changes none of them."""
    found = {name: changes.get(name) or changes.get(names.canonical(name)) for name in group.parameters}
    if not any(found.values()):
        return None
    weights: dict[str, torch.Tensor] = {}
    if not all(change is not None and change.replaces for change in found.values()):
        weights = names.parameters(group, {name: base.tensor(name) for name in group.stored})
    empty = torch.empty(0)
    values = {
        name: (change.applied_to(weights.get(name, empty)) if change is not None else weights[name]).to(dtype)
        for name, change in found.items()
    }
    return names.stored(group, values)
