"""Models whose routers can't choose experts are refused before a text goes through them, in every family."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_core.errors import UserError
from finetune_trainer.model.configuration import CHOSEN_EXPERTS, EXPERT_GROUPS, EXPERTS, load_configuration
from finetune_trainer.model.load import load_base
from tests.trainer.families import write_family

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
    ("mixtral", "num_experts_per_tok", 5): "num_experts_per_tok must be between 1 and num_local_experts (4), and is 5",
    ("qwen3-moe", "num_experts_per_tok", 0): "num_experts_per_tok must be between 1 and num_local_experts (4)",
    ("deepseek-v3", "num_experts_per_tok", 9): "num_experts_per_tok must be between 1 and n_routed_experts (4)",
    ("deepseek-v3", "n_group", 3): "n_group must divide n_routed_experts (4) into groups of at least 2",
    ("deepseek-v3", "n_group", 4): "n_group must divide n_routed_experts (4) into groups of at least 2",
    ("ernie-4.5-moe", "moe_k", 5): "moe_k must be between 1 and moe_num_experts (4), and is 5",
    ("hunyuan-moe", "moe_topk", (2, 5)): "moe_topk must be between 1 and num_experts (4), and is [2, 5]",
    ("dbrx", "ffn_config", (("moe_top_k", 5),)): "moe_top_k must be between 1 and moe_num_experts (4), and is 5",
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [*CHOSEN_EXPERTS, *EXPERTS, *EXPERT_GROUPS, "topk_group", "zero_expert_num", "text_config", "ffn_config"]


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "longcat_flash", "dbrx", "llama"])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.integers(0, 9), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
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
    with pytest.raises(UserError, match=r"num_experts_per_tok must be between 1 and num_experts \(4\), and is 8"):
        load_configuration(tmp_path, "model")


def test_the_refused_numbers_make_a_forward_pass_fail(tmp_path: Path) -> None:
    write_family("mixtral", tmp_path)
    model = load_base(tmp_path, torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids).logits.shape[:2] == (1, 3)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_experts_per_tok = 5
    with pytest.raises(RuntimeError, match="out of range"):
        type(model)(config)(ids)
