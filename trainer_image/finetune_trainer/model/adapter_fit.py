"""Compares the adapter that a job starts from (`model.adapter`) with the base model, before any weight is read: peft
adds the adapter to the model on the meta device, and the tensors of the adapter's file must be those that peft then
expects.

`base_check.py` calls `fit_adapter`. `adapters.py` continues the adapter with the result, and
`checkpoints/merged_base.py` merges it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_core.target_modules import FIELD as TARGETS
from finetune_trainer.model.adaptable import TextPath
from finetune_trainer.model.adapter_patterns import with_plain_names
from finetune_trainer.model.adapters import (
    PEFT_PREFIX,
    WRAPPED,
    AdapterTargets,
    adapted_weight,
    choose_targets,
    targets_of,
)
from finetune_trainer.model.extended_base import model_with_rows
from finetune_trainer.model.given_adapter import FIELD, GivenAdapter
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.pod.errors import first_line, library_boundary, one_line
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Data types that an adapter's tensors may have, in the words of safetensors."""
SHAPE_FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
"""The fields of `adapter_config.json` that say where the adapter's matrices are, and how they are multiplied."""
LORA_MARK = ".lora_"
"""A part of the name of each tensor that belongs to the two matrices or to the norms of an adapter."""


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter whose tensors fit the base model."""

    given: GivenAdapter
    model: PeftModel
    """The base model with the adapter, on the meta device."""
    settings: Mapping[str, Any]
    """The fields SHAPE_FIELDS of the adapter's configuration, with names in place of regular expressions."""
    places: Mapping[str, str]
    """For each trained parameter of `model`, the name of its tensor in the adapter's file."""
    replaced: Mapping[str, str]
    """For each parameter of the base model that the adapter replaces as a whole (`modules_to_save`), the name of its
    tensor in the adapter's file."""

    @cached_property
    def adapted(self) -> list[str]:
        """Full names in the base model of the adapted weights, in the model's order."""
        found = (
            adapted_weight(name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer)
        )
        return list(dict.fromkeys(found))

    def configuration(self, lora: LoRASpec) -> LoraConfig:
        """Return the configuration of the adapter for a training that continues it, with the dropout of ``lora``."""
        config = _configuration(self.settings)
        config.lora_dropout = float(lora.dropout)
        return config

    def weight(self, name: str) -> torch.Tensor:
        """Return the value of the trained parameter ``name`` of `model`. Raises UserError where a number in it is not
        finite."""
        return self.tensor(self.places[name])

    def tensor(self, stored: str) -> torch.Tensor:
        """Return the tensor ``stored`` of the adapter's file in fp32. Raises UserError where a number in it is not
        finite."""
        with safe_open(self.given.folder / ADAPTER_FILE, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(stored).float()
        if not torch.isfinite(value).all():
            raise UserError(FIELD, f"its tensor {_name(stored)} holds numbers that are not finite")
        return value


def fit_adapter(structure: ModelStructure, given: GivenAdapter, *, rows: int) -> FittedAdapter:
    """Return how ``given`` fits the model ``structure``, whose embeddings will have ``rows`` rows. Raises UserError
    that names the tensor or the module that does not fit."""
    same = rows == structure.rows
    bare = copy.deepcopy(structure.model) if same else model_with_rows(structure, rows)
    modules = dict(bare.named_modules())
    _check_tying(structure, given)
    with_matrices = {_inner_name(name).partition(LORA_MARK)[0] for name in given.tensors if LORA_MARK in name}
    settings = with_plain_names(given.config, list(modules), [name for name in modules if name in with_matrices])
    config = _configuration(settings)
    _check_modules(config, list(modules))
    with library_boundary(_unfit), warnings.catch_warnings(), torch.device("meta"):
        # peft warns of tied embeddings, which the caller judges.
        warnings.simplefilter("ignore")
        model = get_peft_model(bare, config, autocast_adapter_dtype=False)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    stored = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    names = {id(value): name for name, value in trained.items()}
    places = {names[id(value)]: name for name, value in stored.items()}
    expected = {stored_name: tuple(trained[name].shape) for name, stored_name in places.items()}
    # peft loads a whole weight only by the name that the parameter has in the model with the adapter.
    whole = {
        name: tuple(value.shape)
        for name, value in model.named_parameters(remove_duplicate=False)
        if not value.requires_grad
    }
    replaced = {}
    for name in sorted(given.tensors):
        if given.tensors[name].dtype not in FLOATS:
            raise UserError(
                FIELD, f"its tensor {_name(name)} is stored as {given.tensors[name].dtype} and must be F32, F16 or BF16"
            )
        if name not in expected:
            if name not in whole:
                raise UserError(FIELD, _extra_problem(name, modules))
            replaced[_inner_name(name)] = name
    for name, shape in expected.items():
        if name not in given.tensors:
            raise UserError(
                FIELD,
                f"does not fit the base model: it lacks the tensor {_name(name)}, which its {ADAPTER_CONFIG_FILE} and"
                " the base model ask for",
            )
        _check_shape(name, given.tensors[name].shape, shape)
    for name in replaced.values():
        _check_shape(name, given.tensors[name].shape, whole[name])
    for saved in given.config.get("modules_to_save") or ():
        for name in whole:
            if _is_below(_inner_name(name), saved) and name not in given.tensors:
                raise UserError(
                    FIELD,
                    f"its files do not fit together: it lacks the tensor {_name(name)}, which the modules_to_save of"
                    f" its {ADAPTER_CONFIG_FILE} ask for",
                )
    return FittedAdapter(given, model, settings, places, replaced)


def _check_tying(structure: ModelStructure, given: GivenAdapter) -> None:
    """Raise UserError where the adapter changes the input embedding and the output head alike (`ensure_weight_tying`),
    in a model in which the two share their weights."""
    if not given.config.get("ensure_weight_tying") or not structure.tied:
        return
    for name in given.tensors:
        if any(_is_below(_inner_name(name), end) for end in (structure.input_name, structure.output_name) if end):
            raise UserError(
                FIELD,
                "is a kind of LoRA adapter that can't be used: by its ensure_weight_tying, it changes the input"
                f" embedding and the output head alike ({_name(name)})",
            )


def continued_targets(structure: ModelStructure, lora: LoRASpec, fitted: FittedAdapter) -> AdapterTargets:
    """Return the weights that the adapter adapts, for a job that continues it. Raises UserError where the adapter can't
    be continued, or where `lora.targetModules` names other modules."""
    whole = next((stored for stored in fitted.replaced.values() if not _is_copy(stored)), None)
    if whole is not None:
        raise UserError(
            f"{FIELD}.use",
            f"must be Merge: the adapter holds the whole tensor {_name(whole)}, and a job with method LoRA trains"
            " adapters only",
        )
    path = TextPath(structure)
    known = {weight.parameter or f"{weight.name}.weight": weight for weight in path.weights}
    for name in fitted.adapted:
        if name not in known:
            raise UserError(
                f"{FIELD}.use", f"must be Merge: the adapter adapts {name}, which no text goes through or no job adapts"
            )
        if known[name].problem:
            raise UserError(f"{FIELD}.use", f"must be Merge: the adapter adapts {name}, {known[name].problem}")
    adapted = set(fitted.adapted)
    targets = targets_of(structure, path, [weight for key, weight in known.items() if key in adapted], lora)
    if lora.target_modules:
        named = set(choose_targets(structure, lora, added_tokens=False).weight_names)
        for difference, what in ((named - adapted, "names"), (adapted - named, "leaves out")):
            if difference:
                other = "does not adapt" if what == "names" else "adapts"
                raise UserError(
                    TARGETS,
                    f"must be absent or name the modules of the adapter that the job continues: it {what}"
                    f" {min(difference)}, which the adapter {other}",
                )
    return targets


def check_copies(fitted: FittedAdapter, folder: Path, dtype: torch.dtype) -> None:
    """Raise UserError where the adapter that a job continues holds a copy of the embedding or of the output head that
    differs from the weight of the model in ``folder``. peft saves such a copy for each of the two that it adapts. Copy
    and weight are compared in ``dtype``."""
    copies = {parameter: stored for parameter, stored in fitted.replaced.items() if _is_copy(stored)}
    if not copies:
        return
    weights = WeightFiles.of(folder)
    names = TensorNames(read_structure(folder).model, weights.shapes, FIELD)
    for parameter, stored in copies.items():
        own = next(iter(names.copies(parameter).values()))
        if not torch.equal(weights.tensor(own).to(dtype), fitted.tensor(stored).to(dtype)):
            raise UserError(
                f"{FIELD}.use",
                f"must be Merge, or the base model another one: the adapter holds {_name(stored)}, whose values are not"
                f" those of {parameter} in the base model",
            )


def _is_copy(stored: str) -> bool:
    """Return whether the tensor ``stored`` of an adapter is a copy of an adapted weight of the base model. peft does
    not train this copy."""
    return WRAPPED in stored


def other_base_notice(given: GivenAdapter, base_name: str) -> list[str]:
    """Return a notice where the adapter names another base model than ``base_name``, the one of the job."""
    if not given.base_name or given.base_name.rstrip("/") == base_name.rstrip("/"):
        return []
    return [
        f"{FIELD}: the adapter names the base model {_name(given.base_name)}, and this job trains"
        f" {base_name}; the shapes of all tensors fit"
    ]


def unknown_fields_notice(given: GivenAdapter) -> list[str]:
    """Return a notice where the configuration of the adapter has fields that the trainer does not know."""
    fields = given.unknown_fields
    if not fields:
        return []
    names = ", ".join(fields[:8]) + (", …" if len(fields) > 8 else "")
    return [
        f"{FIELD}: its {ADAPTER_CONFIG_FILE} has settings that are not known and left out, as by peft: {_name(names)}"
    ]


def _configuration(settings: Mapping[str, Any]) -> LoraConfig:
    """Return the configuration of the adapter for peft."""
    given = {name: settings[name] for name in SHAPE_FIELDS if settings.get(name) is not None}
    ranks = {name: int(rank) for name, rank in given.get("rank_pattern", {}).items()}
    whole = {name: int(given[name]) for name in ("r", "lora_alpha") if name in given}
    with library_boundary(_unfit):
        return LoraConfig(**(given | whole | {"rank_pattern": ranks}), task_type="CAUSAL_LM")


def _check_modules(config: LoraConfig, names: list[str]) -> None:
    """Raise UserError where an entry of the adapter's `target_modules` is no module of the base model. peft would leave
    it out silently."""
    if not isinstance(config.target_modules, set | list):
        return
    for entry in sorted(config.target_modules):
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            raise UserError(
                FIELD,
                f"does not fit the base model: it adapts {_name(entry)}, and the model has no module of that name",
            )


def _inner_name(stored: str) -> str:
    """Return the name in the base model of the parameter that has the name ``stored`` in the model with the adapter."""
    return stored.removeprefix(PEFT_PREFIX).replace(WRAPPED, "")


def _is_below(parameter: str, module: str) -> bool:
    """Return whether ``parameter`` belongs to a module whose name is ``module``, or ends with it."""
    return f".{module}." in f".{parameter}"


def _extra_problem(stored: str, modules: Mapping[str, object]) -> str:
    """Return why there is no place for the tensor ``stored``."""
    inner = _inner_name(stored)
    module = inner.partition(LORA_MARK)[0] if LORA_MARK in inner else inner.rpartition(".")[0]
    if module not in modules:
        return f"does not fit the base model: it holds the tensor {_name(stored)}, for which the model has no module"
    if not stored.startswith(PEFT_PREFIX):
        return f"its tensor {_name(stored)} must have a name that begins with {PEFT_PREFIX}, as peft writes it"
    return (
        f"its files do not fit together: it holds the tensor {_name(stored)}, and its {ADAPTER_CONFIG_FILE} does not"
        " ask for it"
    )


def _check_shape(stored: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found == wanted:
        return
    place = 0 if ".lora_A" in stored or ".lora_embedding_A" in stored else 1
    is_matrix = len(found) == len(wanted) == 2 and LORA_MARK in stored
    hint = ""
    if is_matrix and found[1 - place] == wanted[1 - place]:
        hint = f": its {ADAPTER_CONFIG_FILE} names another rank"
    raise UserError(
        FIELD,
        f"does not fit the base model: its tensor {_name(stored)} has the shape {list(found)}, and must have"
        f" {list(wanted)}{hint}",
    )


def _unfit(error: BaseException) -> UserError:
    return UserError(FIELD, f"can't be added to the base model: {first_line(error)}")


def _name(text: str) -> str:
    """Return a name from a file as it stands in a message."""
    return one_line(text if len(text) <= 200 else f"{text[:200]}…")
