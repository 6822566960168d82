"""Finds the weights of a model that a LoRA adapter can adapt, in its layers, experts, routers and embeddings. Weights
that no text goes through, such as those of a vision tower, are left out.

`adapters.py` chooses among these weights. Only the modules of the model on torch's meta device, and their source code,
are read. So the choice is made before any weight is loaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, cached_property
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_trainer.model.structure import ModelStructure

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Parts of module names that mark a router in a model with experts. A router chooses the experts of a token, or weighs
the output of the shared expert."""
INDEXERS = frozenset({"indexer"})
"""Parts of module names that mark an indexer, which chooses the earlier tokens that a token attends to. No gradient of
the loss reaches an indexer."""
CROSS_ATTENTION = frozenset({"encoder_attn", "crossattention", "cross_attn"})
"""Parts of module names that mark attention to an encoder. Decoders with this attention come from translation models. A
language model that is made of such a decoder has no encoder, so no text goes through the attention."""
MODELS = "transformers.models."
"""Beginning of the names of the modules with the code of transformers' models."""
READ_PAST = "whose weight the model reads without calling the layer"
"""Why some linear layers can't have an adapter, as the end of a sentence."""
OTHER_ROWS = "which looks up other rows than those of its input"
"""Why some embeddings can't have an adapter, as the end of a sentence."""
OTHER_SENSES = re.compile("Vision|Image|Audio|Video|Speech")
"""Words in the names of classes whose modules read pictures or sound, and not text."""


class Part(Enum):
    """What an adaptable weight is in its model."""

    LAYER = auto()
    """A linear layer."""
    EXPERTS = auto()
    """The same layer of all experts, as one tensor of three dimensions."""
    ROUTER = auto()
    """A weight of a router (ROUTERS) or of an indexer (INDEXERS)."""
    EMBEDDING = auto()
    """An embedding or the output head."""


@dataclass(frozen=True)
class AdaptableWeight:
    """A weight that an adapter can be added to, unless `problem` says why not."""

    name: str
    """Full name of the module whose `weight` this is, for example `model.layers.0.self_attn.q_proj`. For a parameter
    with another name than `weight`, the full name of the parameter, for example
    `model.layers.0.mlp.experts.down_proj`."""
    part: Part
    elements: int
    parameter: str | None = None
    """Full name of the parameter, where peft must adapt the parameter itself (`target_parameters`): where it can't add
    the output of an adapter to that of the module, or would read the name of the module as the name of expert weights
    (see `TextPath._moves`). None where peft adapts the module (`target_modules`)."""
    problem: str = ""
    """Why peft can't adapt the weight, as the end of a sentence. Empty where peft can adapt the weight."""

    def has_name(self, name: str) -> bool:
        """Return whether ``name`` is the full name of this weight or the end of the full name, as peft compares. The
        word `weight` alone is no name of a weight."""
        names = [self.name, *([self.parameter] if self.parameter is not None and "." in name else [])]
        return any(full == name or full.endswith(f".{name}") for full in names)


class TextPath:
    """The modules of a model that a text goes through, and their adaptable weights."""

    def __init__(self, structure: ModelStructure) -> None:
        """Take the modules of ``structure``, and find out later, on demand, which of them a text goes through."""
        self._structure = structure
        self._model = structure.model
        self._modules: dict[str, nn.Module] = dict(self._model.named_modules())
        self._embeddings = {name for name in (structure.input_name, structure.output_name) if name is not None}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules that a text goes through, by full name, in the model's order."""
        beside = self._beside_the_text()
        return {
            name: module for name, module in self._modules.items() if not any(_is_below(name, part) for part in beside)
        }

    @cached_property
    def weights(self) -> list[AdaptableWeight]:
        """The adaptable weights that a text goes through, in the model's order."""
        return [weight for name, module in self.modules.items() for weight in self._weights_of(name, module)]

    @cached_property
    def elements(self) -> int:
        """Number of all elements of the parameters that a text goes through, without embeddings and output head."""
        left_out = {id(value) for name in self._embeddings for value in self._modules[name].parameters()}
        found = {
            id(value): value.numel()
            for module in self.modules.values()
            if not isinstance(module, nn.Embedding)
            for value in module.parameters(recurse=False)
            if id(value) not in left_out
        }
        return sum(found.values())

    def is_beside(self, name: str) -> bool:
        """Return whether no text goes through the modules that ``name`` selects, such as modules of a vision tower.
        ``name`` selects each module whose full name is ``name`` or ends with it. False where there is no such
        module."""
        fitting = [full for full in self._modules if full == name or full.endswith(f".{name}")]
        return bool(fitting) and not any(full in self.modules for full in fitting)

    def _beside_the_text(self) -> list[str]:
        """Return names of modules that no text goes through. No text goes through the modules in them either, whether
        their names are returned or not."""
        config = self._model.config
        named = {id(module): name for name, module in self._modules.items()}
        decoder = named[id(self._model.get_decoder())]
        found = [
            name
            for name, module in self._modules.items()
            if name.rpartition(".")[2] in CROSS_ATTENTION
            or (OTHER_SENSES.search(type(module).__name__) and not OTHER_SENSES.search(type(self._model).__name__))
        ]
        if config.get_text_config() is config or not decoder:
            return found
        # The model has several parts, for example one for text and one for pictures. A text goes through the text
        # decoder, and through the modules that contain the output head.
        above = [*_parents(decoder), decoder]
        head = self._structure.output_name or ""
        for parent in above[:-1]:
            for child, _ in self._modules[parent].named_children():
                name = f"{parent}.{child}" if parent else child
                if name not in above and not _is_below(head, name):
                    found.append(name)
        return found

    def _weights_of(self, name: str, module: nn.Module) -> Iterator[AdaptableWeight]:
        if name in self._embeddings or isinstance(module, nn.Embedding):
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                problem = "" if _is_plain_table(module) else OTHER_ROWS
                yield AdaptableWeight(name, Part.EMBEDDING, module.weight.numel(), problem=problem)
            return
        if isinstance(module, nn.Linear | Conv1D):
            is_router = self._is_router(name)
            # A router of a subclass of `nn.Linear` returns several tensors, to which peft can't add a product.
            own = is_router and type(module) is not nn.Linear
            own = own or not _is_plain_product(module)
            yield AdaptableWeight(
                name,
                Part.ROUTER if is_router else Part.LAYER,
                module.weight.numel(),
                f"{name}.weight" if own or self._moves(name) else None,
                self._problem(name),
            )
            return
        if type(module).__module__.startswith("torch."):
            return
        for key, value in module.named_parameters(recurse=False):
            yield from self._raw_weight(name, key, value, module)

    def _raw_weight(self, name: str, key: str, value: torch.Tensor, module: nn.Module) -> Iterator[AdaptableWeight]:
        """Yield the parameter ``key`` of a module that is no linear layer, if it is a weight of experts or of a router.
        ``value`` is the parameter, and ``name`` is the name of the module."""
        full = f"{name}.{key}"
        short = name if key == "weight" else full
        if value.ndim == 3 and min(value.shape) > 1 and self._has_experts:
            yield AdaptableWeight(short, Part.EXPERTS, value.numel(), full)
        elif value.ndim == 2 and key == "weight" and self._is_router(name):
            # peft replaces the router with a wrapper, which has none of the router's other attributes.
            parent, _, leaf = name.rpartition(".")
            read = re.search(rf"self\.{leaf}\.(\w+)", _source(type(self._modules[parent])))
            problem = f"of which the model also reads {read[1]}" if read else ""
            yield AdaptableWeight(short, Part.ROUTER, value.numel(), full, problem)

    @cached_property
    def _has_experts(self) -> bool:
        return any(name.rpartition(".")[2] in ("experts", "router") for name in self.modules)

    def _is_router(self, name: str) -> bool:
        parts = name.split(".")
        return not INDEXERS.isdisjoint(parts) or (self._has_experts and not ROUTERS.isdisjoint(parts))

    def _moves(self, name: str) -> bool:
        """Return whether peft would read the name of the module ``name``, given in `target_modules`, as the name of
        expert weights.

        In some families the experts were linear layers before version 5 of transformers. In such a family, peft turns
        names such as `down_proj` into names of expert weights when it reads a configuration. A dense layer of the same
        name, for example in a shared expert, is then adapted only where the configuration names its parameter.
        """
        leaf = name.rpartition(".")[2]
        if leaf not in self._moved:
            self._moved[leaf] = _peft_moves(leaf, self._model)
        return self._moved[leaf]

    @cached_property
    def _moved(self) -> dict[str, bool]:
        return {}

    def _problem(self, name: str) -> str:
        """Return why peft can't adapt the linear layer ``name``, as the end of a sentence. Empty where peft can adapt
        the layer.

        peft replaces the forward function of a layer. Some models multiply with the weight of a layer without calling
        the layer, so an adapter would have no effect. Some do so in training only, with a limited copy of the weight.
        The source code of the class around the layer shows whether it does so. peft itself refuses some layers of
        Mamba, because it depends on the installed libraries whether a model calls them.
        """
        parent, _, leaf = name.rpartition(".")
        around = type(self._modules[parent])
        if (around, leaf) not in self._read_past:
            try:
                LoraModel._check_target_module_compatiblity(None, LoraConfig(), self._model, leaf)
                code = _source(around)
                self._read_past[around, leaf] = re.search(rf"self\.{leaf}\.weight( @|\.clamp\()", code) is not None
            except ValueError:
                self._read_past[around, leaf] = True
        return READ_PAST if self._read_past[around, leaf] else ""

    @cached_property
    def _read_past(self) -> dict[tuple[type, str], bool]:
        return {}


def layers_read_past(model: Any) -> list[str]:
    """Return the full names of those linear layers of ``model`` whose weight the code of the model reads or changes
    itself, so that the weight must not be quantized. The output head is left out.

    The source code of all classes of the model is searched for the last parts of the layers' names.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    code = "\n".join(_code_that_computes(base) for base in classes if base.__module__.startswith(MODELS))
    read = set(re.findall(r"\.(\w+)\.weight\b", code))
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rpartition(".")[2] in read
    ]


def _code_that_computes(kind: type) -> str:
    """Return the source code of the class ``kind`` without its functions that draw initial weights."""
    code = inspect.getsource(kind)
    for name, member in vars(kind).items():
        if name.startswith(("_init_weights", "init_")) and inspect.isfunction(member):
            code = code.replace(inspect.getsource(member), "")
    return code


def _is_plain_product(module: nn.Linear | Conv1D) -> bool:
    """Return whether the linear layer ``module`` on the meta device gives one vector for each vector that it reads. To
    such an output peft can add the product of an adapter. Other layers, for example those that divide their input into
    groups, need an adapter of the weight itself."""
    if type(module) in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear):
        return True
    try:
        made = module(torch.empty(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except RuntimeError:  # torch can't arrange a single vector as the layer needs it
        return False
    return isinstance(made, torch.Tensor) and made.shape == (1, module.out_features)


def _is_plain_table(module: nn.Module) -> bool:
    """Return whether peft can add the output of an adapter to the output of ``module``, an embedding or an output head.
    An embedding must look up the rows of its input, and may multiply them with its `embed_scale`. Embeddings of
    positions that compute the positions themselves, as in OPT, look up other rows."""
    if not isinstance(module, nn.Embedding):
        return True
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def _source(kind: type) -> str:
    """Return the source code of the class ``kind`` and of its base classes, as far as they belong to the models of
    transformers."""
    own = [base for base in kind.__mro__ if base.__module__.startswith(MODELS)]
    return "\n".join(_own_source(base) for base in own)


@cache
def _own_source(kind: type) -> str:
    """Return the code of the class ``kind`` alone. Python parses the whole module of the class to find the code, which
    takes a tenth of a second for the module of a large family."""
    return inspect.getsource(kind)


def _peft_moves(leaf: str, model: Any) -> bool:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # peft turns this name into names of expert weights only together with another name
        return True
    return set(config.target_modules or ()) != {leaf}


def _is_below(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _parents(name: str) -> list[str]:
    """Return the names of all modules around the module ``name``, the outermost (the empty name) first."""
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces))]


def shortest_names(wanted: Collection[str], all_names: Collection[str]) -> list[str]:
    """Return what peft's `target_modules` must contain to select exactly the modules ``wanted`` out of ``all_names``.

    Where all modules whose names end with the same part, such as `q_proj`, are wanted, this part is returned instead of
    their full names.
    """
    ends: dict[str, list[str]] = {}
    for name in all_names:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    wanted = set(wanted)
    whole = {end for end, names in ends.items() if wanted.issuperset(names)}
    kept = (name.rpartition(".")[2] if name.rpartition(".")[2] in whole else name for name in wanted)
    return sorted(set(kept))
