"""Which tensors of a model's weight files become which parameters of the model that transformers builds, and back.

In many model families the two have different names. GPT-2's published files leave out a prefix, Gemma 3's files put the
parts of the model in another order, and transformers stacks the experts of Mixtral into one parameter. transformers
converts the tensors when it loads a model. The export of a trained model converts the parameters back, so that the
artifact has the tensors of the base model, which other programs know. The check of the weight files and the code that
adds rows to the embeddings or merges an adapter use this module too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of the weight files that become parameters of the model together. A group has one tensor and one
    parameter, unless transformers joins or splits the tensors."""

    stored: Mapping[str, str]
    """The keys are the names of the tensors in the weight files, in the order in which transformers joins the tensors.
    Each value is the pattern of transformers' conversion that fits the name, or empty where nothing is converted."""
    parameters: Sequence[str]
    """The names of the parameters in the model, for example `model.layers.0.mlp.experts.gate_up_proj`."""
    target: str
    """The name of the group for transformers' conversion: the first parameter."""


class TensorNames:
    """The tensors of the weight files of one model, and the parameters of the model."""

    def __init__(self, model: Any, shapes: Mapping[str, Sequence[int]], field: str = "model") -> None:
        """``model`` is the model on the meta device, as `read_structure` builds it. ``shapes`` has the shape of each
        tensor in the weight files by its name. ``field`` is the path in the spec that messages name.

        Raises UserError where transformers can't convert the tensors.
        """
        self._model = model
        self._field = field
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._known: dict[str, torch.Tensor] = model.state_dict()
        first: dict[int, str] = {}
        self._canonical: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._canonical[name] = first.setdefault(id(parameter), name)
        # A wrong file can make the conversions of transformers raise any exception.
        with library_boundary(self._not_convertible):
            mapping = get_model_conversion_mapping(model)
            self._renamings, self._converters = _kinds(mapping)
            self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
            self._groups = self._find_groups()
            # `revert_weight_conversion` reverts the conversions in this attribute, which `from_pretrained` sets too.
            model._weight_conversions = [entry for entry in mapping if entry.was_used()]
        self._group_of_stored = {stored: group for group in self._groups for stored in group.stored}
        self._groups_of_parameter: dict[str, list[TensorGroup]] = {}
        for group in self._groups:
            for name in group.parameters:
                self._groups_of_parameter.setdefault(self.canonical(name), []).append(group)

    def _find_groups(self) -> list[TensorGroup]:
        collected: dict[str, dict[str, str]] = {}
        for stored in sorted(self._shapes, key=dot_natural_key):
            name, pattern = self._loaded_name(stored)
            if name in self._known:
                collected.setdefault(name, {})[stored] = pattern
        groups = []
        for target, members in collected.items():
            if not any(members.values()):
                # Two tensors of the files may become the same parameter. Each then has a group of its own, so that an
                # artifact has both tensors too.
                groups += [TensorGroup({stored: ""}, [target], target) for stored in members]
                continue
            made = self._converted(
                target, members, {name: torch.empty(self._shapes[name], device="meta") for name in members}
            )
            groups.append(TensorGroup(members, [name for name in made if name in self._known], target))
        return groups

    def _loaded_name(self, stored: str) -> tuple[str, str]:
        return _loaded_name(stored, self._renamings, self._converters, self._model, self._known)

    def _converted(
        self, target: str, members: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        converter = deepcopy(self._by_pattern[next(iter(members.values()))])
        for stored, pattern in members.items():
            converter.add_tensor(target, stored, pattern, tensors[stored])
        made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def canonical(self, parameter: str) -> str:
        """Return the first name of ``parameter`` in the model. A tied parameter has several names."""
        return self._canonical.get(parameter, parameter)

    def group(self, stored: str) -> TensorGroup | None:
        """Return the group of the tensor ``stored``, or None where the model has no parameter or buffer for it."""
        return self._group_of_stored.get(stored)

    def copies(self, parameter: str) -> dict[str, str]:
        """Return the names that ``parameter`` and the parameters tied to it have in the weight files, by parameter
        name. Parameters that the files lack, or that transformers converts, are left out."""
        groups = self._groups_of_parameter.get(self.canonical(parameter), [])
        return {group.target: stored for group in groups for stored, pattern in group.stored.items() if not pattern}

    def new_stored_name(self, parameter: str) -> str:
        """Return a name for a new tensor of the weight files that holds ``parameter``. The files have no such tensor so
        far.

        Raises UserError where there is no name under which transformers would load the tensor into the parameter.
        """
        made = [parameter]
        with library_boundary(self._not_convertible):
            made += revert_weight_conversion(self._model, {parameter: self._known[parameter]})
            name = next((name for name in reversed(made) if self._loaded_name(name)[0] == parameter), None)
        if name is None:
            raise UserError(self._field, f"its files can't hold a tensor for {parameter}")
        return name

    def parameters(self, group: TensorGroup, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters of ``group`` by name. They are made of ``stored``, the group's tensors in the weight
        files by name."""
        if not any(group.stored.values()):
            return {group.target: next(iter(stored.values()))}
        with library_boundary(self._not_convertible):
            return self._converted(group.target, group.stored, stored)

    def stored(self, group: TensorGroup, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of ``group`` for the weight files by name, from all its ``parameters``. The result may
        share memory with ``parameters``.

        Raises UserError where transformers does not convert the parameters back to tensors of the same names and
        shapes.
        """
        if not any(group.stored.values()):
            return {next(iter(group.stored)): parameters[group.target]}
        with library_boundary(self._not_convertible):
            reverted = revert_weight_conversion(self._model, dict(parameters))
        found: dict[str, torch.Tensor] = {}
        for made, tensor in reverted.items():
            name = self._own_name(group, made)
            if name is None:
                raise UserError(self._field, f"its files must have the tensor {made}, and lack it")
            found[name] = tensor
        for name in group.stored:
            if name not in found or tuple(found[name].shape) != self._shapes[name]:
                raise UserError(
                    self._field,
                    f"its files have the tensor {name}, to which transformers can't convert a trained model",
                )
        return found

    def _own_name(self, group: TensorGroup, made: str) -> str | None:
        """Return the name in ``group`` of the tensor that transformers calls ``made``. Published files may lack the
        prefix of the model's inner part, or have it in addition."""
        prefix = f"{self._model.base_model_prefix}."
        return next((name for name in (made, made.removeprefix(prefix), prefix + made) if name in group.stored), None)

    def check_writable(self, parameters: Iterable[str]) -> None:
        """Raise UserError where one of ``parameters`` of the model can't be written as tensors of the weight files. The
        conversions run on the meta device, so that no weight is read."""
        checked: set[str] = set()
        for parameter in parameters:
            groups = self._groups_of_parameter.get(self.canonical(parameter), [])
            if not groups:
                raise UserError(self._field, f"its files have no tensor for {parameter}, so it can't be exported")
            for group in groups:
                if group.target not in checked:
                    checked.add(group.target)
                    self.stored(group, {name: self._known[name].to("meta") for name in group.parameters})

    def _not_convertible(self, error: BaseException) -> UserError:
        return UserError(self._field, f"transformers can't convert its tensors: {first_line(error)}")


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return, for each tensor name in ``stored``, the name of the parameter or buffer of ``model`` that is made of the
    tensor, alone or with other tensors. Tensors that the model does not use are left out. ``model`` is on the meta
    device."""
    renamings, converters = _kinds(get_model_conversion_mapping(model))
    known = model.state_dict()
    found = {name: _loaded_name(name, renamings, converters, model, known)[0] for name in stored}
    return {name: loaded for name, loaded in found.items() if loaded in known}


def names_lost_in_shards(model: Any, stored: Iterable[str]) -> list[str]:
    """Return those of the tensors ``stored`` that transformers loads only into a whole ``model``, sorted by name.

    transformers gives some tensors names that the model does not have, because the names in the file look like those of
    an older version. When transformers loads a whole model, it then tries the name in the file. When ZeRO-3 shards the
    model, transformers leaves the tensor out.
    """
    renamings, converters = _kinds(get_model_conversion_mapping(model))
    known, prefix = model.state_dict(), model.base_model_prefix
    return [
        name
        for name in sorted(known.keys() & set(stored))
        if rename_source_key(name, renamings, converters, prefix, known)[0] not in known
    ]


def _kinds(mapping: Sequence[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return the renamings and the conversions in transformers' ``mapping`` of a model."""
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def _loaded_name(
    stored: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    model: Any,
    known: Mapping[str, torch.Tensor],
) -> tuple[str, str]:
    """Return the name of the parameter that the tensor ``stored`` becomes a part of, and the pattern of the conversion,
    as transformers' `from_pretrained` finds them. The pattern is empty where nothing is converted. ``known`` is the
    state of ``model``. It lacks the returned name where the model does not use the tensor."""
    prefix = model.base_model_prefix
    name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
    if name not in known and stored in known:
        name, pattern = rename_source_key(stored, [], [], prefix, known)
    return name, pattern or ""
