"""Models whose routers can't choose experts are refused before a text goes through them, in every family, and all
others run. `test_what_is_refused_fails_and_what_is_accepted_runs` compares the rules with forward passes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_core.errors import UserError
from finetune_trainer.model.configuration import load_configuration, read_configuration
from finetune_trainer.model.load import load_base
from finetune_trainer.model.routing import CHOSEN_EXPERTS, EXPERT_GROUPS, EXPERTS
from finetune_trainer.model.structure import read_structure
from tests.trainer.families import FAMILIES, SHAPE, family_configuration, write_family

NO_CHOICE = {"index_topk", "index_topk_blocks", "centroid_intermediate_top_k"}
"""Fields of configurations with the number of tokens or centroids that are chosen, and not of experts."""
NO_COUNT = {"moe_num_shared_experts", "n_shared_experts", "num_shared_experts"}
"""Fields of configurations with the number of experts that every token goes through."""
PATTERNS = {
    r"top_?k|experts?_per_tok|moe_k$": {*CHOSEN_EXPERTS, "topk_group", *NO_CHOICE},
    r"(num|^n)_.*experts?$": {*EXPERTS, *NO_COUNT},
    r"^n_group$|expert_groups?$": {*EXPERT_GROUPS},
}


def parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig) and "Vision" not in type(value).__name__:
            yield from parts(value)


# transformers can't make a configuration of gemma4_assistant without values.
@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"gemma4_assistant"}))
def test_the_tables_have_every_field_about_routing(kind: str) -> None:
    for part in parts(CONFIG_MAPPING[kind]()):
        names = {*vars(part), *part.attribute_map}
        for pattern, known in PATTERNS.items():
            fields = {name for name in names if re.search(pattern, name) and type(getattr(part, name, 0)) is int}
            assert fields <= known, kind


CHANGES = {
    ("mixtral", "num_experts_per_tok", 5): "num_experts_per_tok must be between 0 and num_local_experts (4), and is 5",
    ("qwen3-moe", "num_experts_per_tok", -1): "num_experts_per_tok must be between 0 and num_local_experts (4)",
    ("deepseek-v3", "num_experts_per_tok", 9): "num_experts_per_tok must be between 0 and n_routed_experts (4)",
    ("deepseek-v3", "n_group", 0): "n_group must divide n_routed_experts (4) into groups of at least 2 experts, and is",
    ("deepseek-v3", "n_group", 3): "n_group must divide n_routed_experts (4) into groups of at least 2 experts, and is",
    ("deepseek-v3", "n_group", 4): "n_group must divide n_routed_experts (4) into groups of at least 2 experts, and is",
    ("deepseek-v3", "n_group", None): "n_group must divide n_routed_experts (4) into groups of at least 2 experts, and",
    ("deepseek-v3", "topk_group", 4): "topk_group must be between 0 and n_group (1), and is 4",
    ("deepseek-v3", "n_routed_experts", 1): "n_routed_experts must be at least 2, and is 1",
    ("deepseek-v2", "topk_method", "noaux_tc"): 'topk_method must be greedy or group_limited_greedy, and is "noaux_tc"',
    (
        "granite-moe",
        "num_local_experts",
        1,
    ): "num_experts_per_tok must be between 0 and num_local_experts (1), and is 2",
    ("granite-4", "num_local_experts", 1): "num_experts_per_tok must be between 0 and num_local_experts (1)",
    ("ernie-4.5-moe", "moe_k", 5): "moe_k must be between 0 and moe_num_experts (4), and is 5",
    ("hunyuan-moe", "moe_topk", (2, 5)): "moe_topk must be between 0 and num_experts (4), and is [2, 5]",
    ("dbrx", "ffn_config", (("moe_top_k", 5),)): "moe_top_k must be between 0 and moe_num_experts (4), and is 5",
}


@pytest.mark.parametrize(("family", "field", "value"), sorted(CHANGES, key=str))
def test_a_router_that_cannot_choose_is_named(family: str, field: str, value: Any, tmp_path: Path) -> None:
    write_family(family, tmp_path)
    load_configuration(tmp_path, "model")
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    given = list(value) if field == "moe_topk" else value
    document[field] = document[field] | dict(value) if field == "ffn_config" else given
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        load_configuration(tmp_path, "model")
    assert CHANGES[family, field, value] in str(caught.value)


def test_a_number_of_experts_for_each_layer_is_accepted(tmp_path: Path) -> None:
    write_family("hunyuan-moe", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_topk": [2, 1]}))
    model = load_base(tmp_path, torch.float32)
    assert model(torch.tensor([[3, 4, 5]])).logits.shape[:2] == (1, 3)


DENSE: Mapping[str, Any] = {
    "first_k_dense_replace": 2, "num_dense_layers": 2, "mlp_layer_types": ["dense", "dense"], "mlp_only_layers": [0, 1],
    "decoder_sparse_step": 3, "moe_layers": [], "interleave_moe_layer_step": 3, "moe_layer_start_index": 2,
    "moe_layer_end_index": 0, "moe_layer_interval": 3, "expert_layer_period": 8, "is_moe": False,
    "enable_moe_block": False, "layers_block_type": ["mlp", "full_attention", "mlp", "full_attention"],
}  # fmt: skip
"""Fields that say which layers have experts, with values for which few or no layers of a tiny model have some."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [
    *CHOSEN_EXPERTS,
    *EXPERTS,
    *EXPERT_GROUPS,
    "topk_group",
    "zero_expert_num",
    "text_config",
    "ffn_config",
    "per_layer_config",
    "topk_method",
    *DENSE,
]


@pytest.mark.parametrize(
    "kind", ["mixtral", "deepseek_v2", "deepseek_v3", "longcat_flash", "dbrx", "llama", "qwen3_moe", "ernie4_5_moe"]
)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.integers(0, 9), min_size=1, max_size=4))
@settings(max_examples=50)
def test_any_numbers_of_experts_are_a_configuration_or_a_sentence(kind: str, values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": kind} | values))
        problem = ""
        try:
            load_configuration(Path(folder), "model")
        except UserError as error:
            problem = str(error)
        assert problem == "" or problem.startswith("model: "), problem


def test_the_message_names_the_number_of_experts_as_the_file_does(tmp_path: Path) -> None:
    write_family("qwen3-moe", tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["num_experts"] = document.pop("num_local_experts")
    path.write_text(json.dumps(document | {"num_experts_per_tok": 8}))
    with pytest.raises(UserError, match=r"num_experts_per_tok must be between 0 and num_experts \(4\), and is 8"):
        load_configuration(tmp_path, "model")


@dataclass(frozen=True)
class Routed:
    """A tiny model with routers, of a family or of a further type of model that transformers knows."""

    document: Mapping[str, Any]
    """The content of its `config.json`."""
    part: str
    """The field of the configuration with the routers' fields. Empty if `config.json` has them itself."""
    names: Mapping[str, str]
    """The names in `config.json` of the fields that the class of the configuration declares."""

    def of(self, known: tuple[str, ...]) -> str:
        """Return the name in `config.json` of the first field in ``known`` that the family has, or nothing."""
        return next((self.names[name] for name in known if name in self.names), "")

    def changed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json` with other values of some fields."""
        whole = dict(self.document)
        if not self.part:
            return whole | dict(changes)
        return whole | {self.part: whole[self.part] | dict(changes)}


FURTHER: Mapping[str, Mapping[str, Any]] = {
    "aria_text": {}, "axk1": {}, "axk2": {"num_key_value_heads": 2}, "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"num_key_value_heads": 2}, "flint": {"mlp_only_layers": []}, "granitemoe_swa": {}, "hy_v4": {},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"]}, "inkling2_text": {}, "kolibri1": {}, "laguna": {},
    "longcat_flash": {"num_key_value_heads": 2, "head_dim": 8, "zero_expert_num": 2}, "mellum": {},
    "minimax_m3_vl_text": {}, "qwen4_exp_text": {},
}  # fmt: skip
"""The types of models with experts that are not among the families, with the fields that make a tiny model run."""
WITH_ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "doge": {"is_moe": True},
    "gemma-4": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "deepseek-v4": {"mlp_layer_types": ["hash_moe", "moe"]},
}
"""Fields that give the tiny models of these families a router."""
MEANINGLESS = {
    ("mixtral", "num_experts_per_tok", 0): "no expert is chosen, so the layers add nothing",
    ("deepseek-v3", "topk_group", 0): "no group is chosen, so all experts have the same score, and any are taken",
    ("deepseek-v2", "n_group", 3): "with topk_method greedy the router does not read the number of groups",
    ("phi-moe", "num_experts_per_tok", -1): "the router always chooses two experts",
    ("dbrx", "ffn_config", (("moe_num_experts", 0), ("moe_top_k", 0))): "without experts the layers add nothing",
}
"""Values that make no sense, and with which transformers computes something without an error. They are accepted, and
the words say what transformers computes."""


@cache
def routed_models() -> Mapping[str, Routed]:
    """Return the tiny models with routers by the names of their families, or else by their types."""
    configs = {name: family_configuration(name, vocabulary=64) for name in FAMILIES}
    for kind, shape in FURTHER.items():
        known = {field.name for field in fields(CONFIG_MAPPING[kind])} | set(CONFIG_MAPPING[kind].attribute_map)
        sizes = {name: value for name, value in SHAPE.items() if name in known}
        configs[kind] = CONFIG_MAPPING[kind](**{"vocab_size": 64, **sizes, **shape})
    models = {}
    for name, config in configs.items():
        inner = {at: part for at, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
        for at, part in {"": config, **inner}.items():
            names = {field.name: part.attribute_map.get(field.name, field.name) for field in fields(part)}
            model = Routed(json.loads(json.dumps(config.to_dict())), at, names)
            if model.of(EXPERTS) and model.of(CHOSEN_EXPERTS) and at != "vision_config":
                models[name] = Routed(model.changed(WITH_ROUTERS.get(name, {})), at, names)
    return models


def cases(model: Routed) -> Iterator[dict[str, Any]]:
    """Yield changes of ``model`` around the boundaries of each field, and of fields that depend on each other."""
    experts, chosen = model.of(EXPERTS), model.of(CHOSEN_EXPERTS)
    yield from ({chosen: value} for value in (-1, 0, 1, 3, 4, 5, None))
    few = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 2), (2, 3))
    yield from ({experts: number, chosen: value} for number, value in few)
    yield from ({experts: None}, {chosen: True}, {chosen: 2.0})
    yield {"per_layer_config": {"1": {chosen: 1}}}
    yield from ({model.names[name]: value, chosen: 5} for name, value in DENSE.items() if name in model.names)
    if "mlp_layer_types" in model.names:
        yield {"mlp_layer_types": None, "first_k_dense_replace": 2, chosen: 5}
    if "zero_expert_num" in model.names:
        yield from ({"zero_expert_num": zeros, chosen: value} for zeros in (0, 2) for value in (4, 5, 6, 7))
        yield from ({experts: 0, "zero_expert_num": zeros, chosen: value} for zeros in (0, 2) for value in (0, 1, 2, 3))
    groups = model.of(EXPERT_GROUPS)
    if not groups:
        return
    method: dict[str, Any] = {}
    if "topk_method" in model.names:
        method = {"topk_method": "group_limited_greedy"}
        yield from ({"topk_method": other} for other in ("greedy", "noaux_tc", None))
        yield from ({"topk_method": "greedy", groups: number, "topk_group": number} for number in (-1, 0, 3, 5, None))
    for number in (-1, 0, 1, 2, 3, 4):
        yield from ({**method, groups: number, "topk_group": value} for value in {0, number, number + 1})
    yield from ({**method, groups: number, "topk_group": value} for number, value in ((None, None), (2, None)))
    yield from ({**method, experts: 1, chosen: 1, groups: 1, "topk_group": value} for value in (1, 2))
    yield {**method, experts: 8, chosen: 5, groups: 2, "topk_group": 1}


def refusal(folder: Path, *, structure: bool = False) -> str:
    try:
        _ = read_structure(folder) if structure else load_configuration(folder, "model")
    except UserError as error:
        return str(error)
    return ""


def failure(folder: Path) -> str:
    """Return why a text can't go through the model in ``folder``, or nothing if it can."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(read_configuration(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor([[3, 4, 5, 6, 7]]), use_cache=False).logits
    except Exception as error:  # noqa: BLE001 -- the code of transformers raises any exception
        return f"{type(error).__name__}: {error}"
    return "" if torch.isfinite(logits).all() else "the logits are not finite"


@pytest.mark.parametrize("name", sorted(routed_models()))
def test_what_is_refused_fails_and_what_is_accepted_runs(name: str, tmp_path: Path) -> None:
    model = routed_models()[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.document))
    assert (refusal(tmp_path), failure(tmp_path)) == ("", "")
    wrong = []
    for changes in cases(model):
        path.write_text(json.dumps(model.changed(changes)))
        refused, failed = refusal(tmp_path), failure(tmp_path)
        if failed and not refused:
            # Some models can't even be built. The structure of the model, which is read next, says so.
            refused = refusal(tmp_path, structure=True)
        if bool(refused) != bool(failed):
            wrong.append((changes, refused, failed))
    assert wrong == []


def test_every_type_with_experts_is_compared() -> None:
    kinds = {model.document["model_type"] for model in routed_models().values()}
    kinds |= {model.document[model.part]["model_type"] for model in routed_models().values() if model.part}
    for kind in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"gemma4_assistant"} - kinds:
        for part in parts(CONFIG_MAPPING[kind]()):
            names = {field.name for field in fields(part)}
            assert part.model_type in kinds or not names & {*EXPERTS} or not names & {*CHOSEN_EXPERTS}, kind


@pytest.mark.parametrize(("family", "field", "value"), sorted(MEANINGLESS, key=str))
def test_numbers_without_a_meaning_are_accepted_where_transformers_runs_them(
    family: str, field: str, value: Any, tmp_path: Path
) -> None:
    model = routed_models()[family]
    changes = dict(value) if field == model.part else {field: value}
    (tmp_path / "config.json").write_text(json.dumps(model.changed(changes)))
    assert (refusal(tmp_path), failure(tmp_path)) == ("", ""), MEANINGLESS[family, field, value]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_that_a_family_does_not_have_are_not_judged(family: str, tmp_path: Path) -> None:
    config = family_configuration(family, vocabulary=64)
    known = {*vars(config), *(field.name for field in fields(config)), *config.attribute_map}
    left = {*EXPERTS, *CHOSEN_EXPERTS, *EXPERT_GROUPS, "topk_group", "topk_method"} - known
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    before = refusal(tmp_path)
    path.write_text(json.dumps(config.to_dict() | {name: 3 + number for number, name in enumerate(sorted(left))}))
    assert refusal(tmp_path) == before
    # One family without experts, and one with experts of which some have groups.
    assert family not in ("llama-3", "mixtral") or failure(tmp_path) == ""
