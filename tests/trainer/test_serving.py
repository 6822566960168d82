"""The artifact of a job can be served. By the rules in `vllm_rules.py`, vLLM takes the adapters that docs/serving.md
says it takes. Plain transformers and peft write the same texts from an adapter as from the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from examples.demo.base_model import base_model
from finetune_core.api.method import LoRASpec
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.adapters import add_adapters, choose_targets
from finetune_trainer.model.extended_base import extend_base
from finetune_trainer.model.structure import read_structure
from tests.trainer import tiny
from tests.trainer.exporting import change_values, export, load_whole
from tests.trainer.families import write_family
from tests.trainer.vllm_rules import llama, needed_rank, qwen2, qwen3_moe, refusals


def adapter_of(base: Path, folder: Path, *, added_tokens: bool = False, **changes: Any) -> Path:
    """Export an adapter of the model in ``base`` as a job does, with ``changes`` of the job's LoRA settings, together
    with the merged model. Return the artifact's folder."""
    lora = LoRASpec(**changes)
    targets = choose_targets(read_structure(base), lora, added_tokens=added_tokens)
    model = add_adapters(
        load_whole(base), lora, targets=targets.modules, parameters=targets.parameters, seed=1, base_name="base"
    )
    change_values(model)
    return export(model, base, folder, kind="Both")


@pytest.mark.parametrize("changes", [{}, {"rank": 3}, {"rank": 64}, {"rs_lora": True}, {"target_modules": ["q_proj"]}])
def test_vllm_takes_an_adapter_of_dense_layers(changes: dict[str, Any], tmp_path: Path) -> None:
    adapter = adapter_of(tiny.write_model(tmp_path / "base"), tmp_path, **changes)
    assert refusals(adapter, llama(64), max_lora_rank=needed_rank(adapter)) == []


def test_vllm_refuses_a_rank_above_its_own_setting(tmp_path: Path) -> None:
    adapter = adapter_of(tiny.write_model(tmp_path / "base"), tmp_path, rank=17)
    assert refusals(adapter, llama(64)) == ["a rank is not between 1 and 16"]
    assert needed_rank(adapter) == 32


def test_vllm_refuses_dora(tmp_path: Path) -> None:
    adapter = adapter_of(tiny.write_model(tmp_path / "base"), tmp_path, do_ra=True)
    assert "use_dora is not supported" in refusals(adapter, llama(64))


def test_vllm_takes_added_tokens_where_it_serves_the_extended_base_model(tmp_path: Path) -> None:
    """The embedding rows of the added tokens are in the extended base model with which the adapter was trained, so the
    adapter itself has no extra vocabulary."""
    base = tiny.write_model(tmp_path / "base", tied=False)
    extend_base(base, tmp_path / "extended", tokens=["<A>", "<B>"], untie=False, seed=1)
    adapter = adapter_of(tmp_path / "extended", tmp_path, added_tokens=True)
    assert refusals(adapter, llama(66)) == []
    assert refusals(adapter, llama(64)) == [
        "model.embed_tokens has another number of tokens than the base model that is served"
    ]
    no_embeddings = refusals(adapter, qwen2(66))
    assert no_embeddings
    assert {problem.split()[0] for problem in no_embeddings} == {"lm_head", "model.embed_tokens"}


def test_vllm_refuses_an_adapter_of_a_very_large_output_head_and_takes_those_of_the_layers(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", tied=False)
    head = adapter_of(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert refusals(head, llama(64)) == []
    assert {problem.split()[0] for problem in refusals(head, llama(262_144))} == {"lm_head"}
    assert refusals(adapter_of(base, tmp_path / "layers"), llama(262_144)) == []


@pytest.mark.parametrize(
    ("family", "target_modules"),
    [
        ("llama-3", [r"model\.layers\.[01]\..*proj"]),
        ("llama-3", ["all-linear", "lm_head"]),
        ("llama-3-tied", ["q_proj", "model.layers.0.mlp.down_proj"]),
    ],
)
def test_vllm_takes_adapters_of_patterns_and_single_layers(
    family: str, target_modules: list[str], tmp_path: Path
) -> None:
    base = write_family(family, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=target_modules, rs_lora=True)
    assert refusals(adapter, llama(64)) == []


def test_vllm_refuses_adapters_of_experts_and_takes_those_of_the_layers_around_them(tmp_path: Path) -> None:
    base = write_family("qwen3-moe", tmp_path / "base")
    problems = refusals(adapter_of(base, tmp_path / "experts"), qwen3_moe(64, 4))
    assert problems
    assert all(".experts" in problem for problem in problems)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = adapter_of(base, tmp_path / "attention", target_modules=attention)
    assert refusals(adapter, qwen3_moe(64, 4)) == []


def test_plain_transformers_writes_the_same_text_from_adapter_and_merged_model(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    artifact = adapter_of(base, tmp_path, rank=4)
    check_texts(base, artifact, "ask w1 w2 w3 answer")


@pytest.mark.long
def test_plain_transformers_writes_the_same_text_from_adapter_and_merged_smollm2(tmp_path: Path) -> None:
    artifact = adapter_of(base_model(), tmp_path, rank=8)
    check_texts(base_model(), artifact, "The capital of France is")


def check_texts(base: Path, artifact: Path, prompt: str) -> None:
    """Assert that plain transformers and peft write the same text from the adapter as from the merged model, and that
    the tokenizers of both have the same vocabulary."""
    asked = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), artifact)
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **asked)[0]["generated_text"]
        for model in (adapted.eval(), str(artifact / "merged"))
    ]
    assert texts[0] == texts[1] != ""
    assert load_tokenizer(artifact / "merged").get_vocab() == tokenizer.get_vocab()
