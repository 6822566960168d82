"""Whether the routers of a mixture of experts can choose experts, from `config.json` alone. `configuration.py` calls
`routing_problem`.

transformers builds a model with almost any of these numbers, and fails only when a text goes through a router. Only
those fields are judged that the family's configuration class declares, and only for layers with a router. The rules
follow the routers in transformers; `tests/trainer/test_routing.py` compares them with forward passes of all families.

The module does not import torch, for the same reason as `configuration.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from math import isqrt
from typing import Any

from transformers import PreTrainedConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of a configuration with the number of experts among which a router chooses, in all families."""
CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip
"""Fields of a configuration with the number of experts that a router chooses for a token, in all families."""
EXPERT_GROUPS = ("n_group", "num_expert_group")
"""Fields of a configuration with the number of groups of experts. A router first chooses `topk_group` groups."""
GROUP_METHODS = {"greedy": False, "group_limited_greedy": True}
"""The values of `topk_method` that DeepSeek-V2's routers know, and whether a router with this value has groups."""

EXPERTS_WITHOUT_ROUTER = {
    "flint": 0, "granitemoehybrid": 0, "jamba": 1, "qwen2_moe": 0, "qwen3_moe": 0, "qwen3_next": 0,
}  # fmt: skip
"""By type of model: up to this number of experts, the layers have one dense MLP and no router."""
CHOOSES_ALWAYS = {"phimoe": 2}
"""By type of model: the number of experts that a router always chooses, whatever its configuration says."""
LEAST_EXPERTS = {"": 0, "doge": 0, **CHOOSES_ALWAYS}
"""By type of model: the smallest number of experts with which a router runs, where this is not 1, or 2 with groups. The
empty type is that of DBRX's `ffn_config`: without experts, DBRX's layers add nothing, and Doge's have their shared
expert."""
LEAST_CHOSEN = {"jetmoe": 1}
"""By type of model: the smallest number of chosen experts with which a router runs, where this is not 0. With 0, the
layers of the other families add nothing, or only what their shared experts return. JetMoe's attention has heads for
each chosen expert."""


def routing_problem(part: Any, text: Any, document: str) -> str:
    """Return why the routers that ``part`` describes can't choose experts, or nothing if they can.

    ``text`` is the configuration of the model that reads the text; ``part`` is ``text`` or a configuration in ``text``.
    The answer names the fields as ``document``, the text of `config.json`, does, because transformers has two names for
    some fields.
    """
    fields = _declared(part)
    experts = next((name for name in EXPERTS if name in fields), None)
    # transformers builds no experts where their number is none.
    if experts is None or type(fields[experts]) is not int:
        return ""
    layers = getattr(text, "num_hidden_layers", 0)
    for layer in range(layers if isinstance(layers, int) else 0):
        if _has_router(fields, part.model_type, fields[experts], layer):
            problem = _Router(part, fields, experts, layer, document).problem()
            if problem:
                return problem
    return ""


@dataclass(frozen=True)
class _Router:
    """The router of one layer."""

    config: PreTrainedConfig
    """The configuration with the router's fields."""
    fields: Mapping[str, Any]
    """The declared fields of the configuration."""
    experts: str
    """The field with the number of experts, which is an integer."""
    layer: int
    """The number of the layer, from 0."""
    document: str
    """The text of `config.json`."""

    def problem(self) -> str:
        """Return why the router can't choose experts, or nothing if it can."""
        fields, kind, experts = self.fields, self.config.model_type, self.fields[self.experts]
        groups = next((name for name in EXPERT_GROUPS if name in fields), None)
        chosen = next((name for name in CHOSEN_EXPERTS if name in fields), None)
        for name in filter(None, (self.experts, chosen, groups, "topk_group")):
            # No router reads the values for single layers that `per_layer_config` can have.
            if name in fields and name in (self.config.per_layer_attributes or ()):
                return f"{self._written(name)} must be one number for all layers, and is a part of per_layer_config"
        method = fields.get("topk_method", "group_limited_greedy")
        if method not in GROUP_METHODS:
            return f"{self._written('topk_method')} must be {' or '.join(GROUP_METHODS)}, and is {_shown(method)}"
        # A.X-K2's routers have no groups without this field.
        if not GROUP_METHODS[method] or (kind == "axk2" and groups is not None and fields[groups] is None):
            groups = None
        # All families but DeepSeek-V2 rate a group by its two best experts.
        least_in_group = 1 if groups is None or "topk_method" in fields else 2
        most, least = _most(fields, kind, experts), LEAST_EXPERTS.get(kind, least_in_group)
        if most < least:
            return f"{self._written(self.experts)} must be at least {least}, and is {experts}"
        problem = self._group_problem(groups, least_in_group) if groups is not None else ""
        if problem or chosen is None or kind in CHOOSES_ALWAYS:
            return problem
        # LongCat's experts can return nothing for no expert, but drop a dimension of their mask for one.
        one = kind == "longcat_flash" and fields[chosen] == 1
        return self._between(chosen, 2 if one else LEAST_CHOSEN.get(kind, 0), self.experts, most)

    def _group_problem(self, groups: str, least: int) -> str:
        """Return why the router can't choose groups of experts. ``groups`` is the field with their number, and
        ``least`` the smallest number of experts in a group."""
        number, experts = self.fields[groups], self.fields[self.experts]
        if type(number) is int and number >= 1 and experts % number == 0 and experts // number >= least:
            return self._between("topk_group", 0, groups, number)
        into = f" into groups of at least {least} experts" if least > 1 else ""
        return (
            f"{self._written(groups)} must divide {self._written(self.experts)} ({experts}){into}, and is"
            f" {_shown(number)}"
        )

    def _between(self, name: str, least: int, source: str, most: int) -> str:
        """Return that field ``name`` is not between ``least`` and ``most``, which follows from field ``source``, or
        nothing if the field is."""
        given = self.fields[name]
        # Hunyuan's models may have a number for each layer.
        number = given[self.layer] if isinstance(given, list) and self.layer < len(given) else given
        if type(number) is int and least <= number <= most:
            return ""
        limits = f"between {least} and {self._written(source)} ({most})"
        return f"{self._written(name)} must be {limits}, and is {_shown(given)}"

    def _written(self, name: str) -> str:
        """Return the name that field ``name`` has in `config.json`."""
        names = self.config.attribute_map
        stored = names.get(name, name)
        others = [other for other, mapped in names.items() if mapped == stored]
        return next((known for known in (name, stored, *others) if f'"{known}"' in self.document), name)


def _most(fields: Mapping[str, Any], kind: str, experts: int) -> int:
    """Return the largest number of experts that a router can choose."""
    if kind == "doge":
        # Doge's routers choose pairs of keys, and an expert is a pair.
        return isqrt(experts) ** 2
    # LongCat's routers also choose among experts that return their input.
    without_weights = fields.get("zero_expert_num")
    return experts + (without_weights if isinstance(without_weights, int) else 0)


def _has_router(fields: Mapping[str, Any], kind: str, experts: int, layer: int) -> bool:
    """Return whether layer number ``layer`` has a router. Each family has some of the fields that are read here."""
    if experts <= EXPERTS_WITHOUT_ROUTER.get(kind, -1):
        return False
    if not fields.get("is_moe", True) or not fields.get("enable_moe_block", True):
        return False
    for types in ("mlp_layer_types", "layers_block_type"):
        if isinstance(fields.get(types), list):
            # DeepSeek-V4's first layers (hash_moe) have a table instead of a router.
            return fields[types][layer : layer + 1] in (["sparse"], ["moe"])

    def number(name: str, default: int) -> int:
        value = fields.get(name)
        return value if isinstance(value, int) else default

    if layer < max(number("first_k_dense_replace", 0), number("num_dense_layers", 0)):
        return False
    if layer < number("moe_layer_start_index", 0) or layer > number("moe_layer_end_index", layer):
        return False
    dense, sparse = fields.get("mlp_only_layers"), fields.get("moe_layers")
    if (isinstance(dense, list) and layer in dense) or (isinstance(sparse, list) and layer not in sparse):
        return False
    steps = {name: number(name, 1) for name in ("decoder_sparse_step", "moe_layer_interval")}
    # transformers builds no model with a step of 0.
    if any(step == 0 or (layer + 1) % step for step in steps.values()):
        return False
    period = number("expert_layer_period", 1)
    return period != 0 and layer % period == number("expert_layer_offset", 0)


def _declared(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that the class of ``config`` declares, with their values. A file can have further fields, which
    transformers keeps and no model reads."""
    values = vars(config)
    stored = {field.name: config.attribute_map.get(field.name, field.name) for field in dataclass_fields(config)}
    return {name: values[attribute] for name, attribute in stored.items() if attribute in values}


def _shown(value: Any) -> str:
    """Return the beginning of ``value`` as it stands in `config.json`."""
    return json.dumps(value, default=str)[:40]
