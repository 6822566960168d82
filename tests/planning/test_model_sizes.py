"""The sizes that the plan reads out of a configuration are those of the models that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.errors import UserError
from finetune_core.planning.model_families import FAMILIES, UnknownModelError, model_sizes
from finetune_core.planning.model_sizes import Part
from tests.planning.memory_cases import MODELS

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


def built(configuration: dict[str, Any]) -> Any:
    """Return the model of ``configuration`` without weights, as transformers builds it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**configuration))


def as_published(model: Any) -> dict[str, Any]:
    """Return the content of the `config.json` that transformers writes for ``model``."""
    values: dict[str, Any] = model.config.to_dict()
    return values


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_each_known_family_are_those_of_transformers(family: str, variant: dict[str, Any]) -> None:
    experts = EXPERTS if FAMILIES[family].experts else {}
    model = built({"model_type": family, **TINY, **experts, **variant})
    sizes = model_sizes(as_published(model))
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.largest_tensor == max(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    assert sizes.embedding_parameters == embedding.numel()
    assert sizes.tied == (model.get_output_embeddings().weight is embedding)
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for number, layer in enumerate(sizes.layers):
        assert {f"{sizes.prefix}.{number}.{linear.name}" for linear in layer.linears} <= names


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_each_published_shape_are_those_of_transformers(name: str) -> None:
    model = built(MODELS[name])
    assert model_sizes(as_published(model)).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters", "linear", "with_ends", "queries_and_values"),
    [
        ("Llama-2-7B", 6_738_415_616, 19_988_480, 20_566_080, 8.4e6 / 2),
        ("Llama-2-13B", 13_015_864_320, 31_293_440, 31_887_424, 13.1e6 / 2),
        ("Llama-2-70B", 68_976_648_192, 103_546_880, 104_190_016, 32.8e6 / 2),
    ],
)
def test_the_adapters_have_the_published_numbers_of_parameters(
    model: str, parameters: int, linear: int, with_ends: int, queries_and_values: float
) -> None:
    sizes = model_sizes(MODELS[model])
    assert sizes.parameters == parameters
    assert sizes.adapted([]).parameters(sizes, 8) == linear
    # 32,000 rows and 4 added ones.
    assert sizes.adapted([], added_tokens=True).parameters(sizes, 8, added_rows=4) == with_ends
    assert sizes.adapted(["q_proj", "v_proj"]).parameters(sizes, 8) == pytest.approx(queries_and_values, rel=0.01)


def test_adapters_go_where_the_entries_say() -> None:
    sizes = model_sizes(MODELS["Llama-2-7B"])
    first = sizes.adapted([r"model\.layers\.[0-3]\..*"])
    assert [len(layer) for layer in first.layers] == [7] * 4 + [0] * 28
    assert sizes.adapted(["lm_head"]).head
    assert not sizes.adapted(["all-linear"], added_tokens=True).head
    experts = model_sizes(MODELS["Mixtral-8x7B"])
    assert all(linear.part is not Part.ROUTER for layer in experts.adapted([]).layers for linear in layer)


def test_only_the_experts_that_compute_a_token_count_for_its_arithmetic() -> None:
    """Mixtral 8x7B has 46.7 billion parameters, of which a token uses 12.9 billion (arXiv 2401.04088)."""
    sizes = model_sizes(MODELS["Mixtral-8x7B"])
    assert sizes.parameters == pytest.approx(46.7e9, rel=0.001)
    assert sizes.matrix_parameters + sizes.embedding_parameters == pytest.approx(12.9e9, rel=0.005)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bert"}, "config.json: model_type: must be one that the plan knows, and 'bert' is none"),
        ({"model_type": None}, "config.json: model_type: must be one that the plan knows"),
        ({"hidden_size": None}, "config.json: hidden_size: must be a whole number of at least 1, and is None"),
        ({"vocab_size": "32000"}, "config.json: vocab_size: must be a whole number of at least 1, and is '32000'"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers: must be a whole number of at least 1, and is 0"),
        ({"num_key_value_heads": 3}, "config.json: num_attention_heads: must be a multiple of num_key_value_heads, 3"),
        ({"tie_word_embeddings": 1}, "config.json: tie_word_embeddings: must be true or false, and is 1"),
        ({"model_type": ""}, "config.json: model_type: must be one that the plan knows, and the file has none"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers: must be at most 2,000, and is 1000000000"),
        ({"vocab_size": 10**300}, "config.json: vocab_size: must be at most 10,000,000, and is 1000"),
        (
            {"num_attention_heads": 8192, "num_key_value_heads": 8192},
            "config.json: num_attention_heads: must be at most hidden_size, 4096, without head_dim",
        ),
    ],
)
def test_a_wrong_configuration_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        model_sizes({**MODELS["Llama-2-7B"], **change})
    assert str(caught.value).startswith(sentence)
    assert isinstance(caught.value, UnknownModelError) == ("model_type" in change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts_per_tok": 200}, "num_experts_per_tok: must be at most the number of experts, 128, and is 200"),
        ({"mlp_only_layers": 5}, "mlp_only_layers: must be a list of numbers of layers, and is 5"),
        ({"num_experts": None}, "num_experts: must be a whole number of at least 1, and is None"),
    ],
)
def test_a_wrong_number_of_experts_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        model_sizes({**MODELS["Qwen3-30B-A3B"], **change})
    assert str(caught.value) == f"config.json: {sentence}"


def test_an_entry_that_names_nothing_is_refused() -> None:
    sizes = model_sizes(MODELS["Llama-2-7B"])
    with pytest.raises(UserError, match=r"lora\.targetModules: must name modules of the model, and 'query' is none"):
        sizes.adapted(["q_proj", "query"])
