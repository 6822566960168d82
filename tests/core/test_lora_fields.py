"""Wrong values of the fields of `lora` are refused before anything runs. A job with another variant of LoRA is another
training."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.api.job import FineTuneJob
from finetune_core.contract.same_training import settings_digest
from finetune_core.resolve import resolve
from finetune_core.target_modules import compile_entry, is_pattern
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart


def problems(lora: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in validate_job(quickstart("lora", lora)).problems]


def digest(lora: dict[str, Any]) -> str:
    return settings_digest(resolve(FineTuneJob.model_validate(quickstart("lora", lora)), report=None))


@pytest.mark.parametrize(
    "entries",
    [
        ["q_proj", "self_attn.v_proj", "model.layers.0.mlp.experts.down_proj"],
        ["all-linear"],
        [r"model\.layers\.([0-9]|1[0-5])\..*", ".*_proj"],
    ],
    ids=str,
)
def test_names_patterns_and_all_linear_are_valid(entries: list[str]) -> None:
    assert problems({"targetModules": entries}) == []


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (
            {"targetModules": ["q_proj", "*_proj"]},
            "spec.lora.targetModules[1]: '*_proj' must be a regular expression in the syntax of RE2: no argument for",
        ),
        ({"targetModules": ["(q|v)(?=_proj)"]}, "spec.lora.targetModules[0]: '(q|v)(?=_proj)' must be a regular"),
        ({"loraPlusRatio": "0.5"}, "`loraPlusRatio` must be at least 1"),
        ({"useDora": True}, "unknown field"),
    ],
    ids=str,
)
def test_what_can_not_be_meant_is_a_sentence_with_the_field(lora: dict[str, Any], sentence: str) -> None:
    assert any(sentence in problem for problem in problems(lora)), problems(lora)


@pytest.mark.parametrize(
    ("section", "field", "value", "sentence"),
    [
        ("deepspeed", "zeroStage", 3, "`deepspeed.zeroStage` must be 1, 2, None or Auto with"),
        ("deepspeed", "zeroStage", 2, ""),
        ("deepspeed", "zeroStage", "None", ""),
        ("storage", "artifact", "Merged", "`storage.artifact` must be Adapter with `lora.quantization`"),
        ("storage", "artifact", "Adapter", ""),
    ],
)
def test_a_quantized_base_model_is_neither_sharded_nor_merged(
    section: str, field: str, value: Any, sentence: str
) -> None:
    job = quickstart("lora", {"quantization": "NF4"})
    job["spec"]["resources"]["nodes"] = 1
    job["spec"][section] = {**job["spec"].get(section, {}), field: value}
    found = [str(problem) for problem in validate_job(job).problems]
    assert [sentence in problem for problem in found] == ([True] if sentence else [])


@pytest.mark.parametrize("name", ["q_proj", "model.layers.0.mlp.experts.gate_up_proj", "all-linear", "0.weight"])
def test_a_name_is_no_pattern(name: str) -> None:
    assert not is_pattern(name)


@pytest.mark.parametrize("pattern", [".*", r"model\.layers\.0", "q_proj|v_proj", "q-proj", "[qv]_proj"])
def test_an_entry_with_a_character_that_no_name_has_is_a_pattern(pattern: str) -> None:
    assert is_pattern(pattern)
    assert compile_entry(pattern).fullmatch("nothing") is None or pattern == ".*"


def test_every_variant_is_another_training_and_false_is_the_same_as_absent() -> None:
    plain = {"rank": 8, "alpha": 16}
    variants: list[dict[str, Any]] = [{}, {"rsLoRA": True}, {"doRA": True}, {"loraPlusRatio": "16"}]
    variants += [{"quantization": "NF4"}, {"targetModules": ["all-linear"]}]
    digests = {digest(plain | variant) for variant in variants}
    assert len(digests) == len(variants)
    assert digest(plain | {"rsLoRA": False, "doRA": False}) == digest(plain)
