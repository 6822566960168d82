"""The Hugging Face Hub can read the model card of an artifact. The card says what the model was made of and holds no
secret, and a name that a user chose can't change the card's structure."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import EvaluationRecord, Identity, RunConfig, ScoreRecord
from finetune_trainer.checkpoints.model_card import CardFacts, code, model_card

HUB = {"huggingFace": {"repo": "team/base", "revision": "main"}}
ATTACKS = [
    "x\n---\nlicense: mit\n---",
    "`</code><script>alert(1)</script>",
    "[link](https://evil.example)",
    "a | b\r\n# heading\u2028## more",
    "![image](https://evil.example/x.png)``` ",
    "``",
    " ",
    "\u202eevil\x00",
]


def run_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "world": {"nodes": 2, "processesPerNode": 4, "device": "GPU"},
        "model": HUB,
        "dataset": {
            "train": {"huggingFace": {"repo": "team/rows", "revision": "v1", "split": "train"}},
            "validation": {"s3": {"uri": "s3://bucket/rows.jsonl"}},
            "format": {"text": {}},
            "maxLength": 64,
        },
        "method": "LoRA",
        "lora": {"rank": 4, "alpha": 8},
        "optimization": {
            "learningRate": 1e-3, "maxSteps": 6, "globalBatchSize": 6, "microBatchSize": 2, "schedule": "Constant",
            "warmupSteps": 0, "weightDecay": 0, "gradientClipping": 1.0, "precision": "bf16",
            "gradientCheckpointing": False, "seed": 42, "zeroStage": 2, "overrides": '{"secret": "word-of-a-person"}',
        },
        "evaluation": {"artifactFrom": "Last"},
        "storage": {
            "uri": "s3://bucket/runs/team/job/uid-1", "endpoint": "https://me:password@store.example",
            "region": "us-east-1", "checkpointEverySteps": 3, "keepLast": 2,
        },
    }  # fmt: skip
    return RunConfig.model_validate(values | changes)


def facts(**changes: Any) -> CardFacts:
    identity = Identity(
        namespace="team", name="job", uid="uid-1", attempt=2, pod_name="p", pod_uid="pod-uid", node_rank=0
    )
    given: dict[str, Any] = {
        "identity": identity, "base_revision": "0123abc", "base_sha256": "d1" * 32, "data_sha256": "e2" * 32,
        "examples": 20, "step": 6, "evaluation": None,
    }  # fmt: skip
    return CardFacts(**(given | changes))


def header(card: str) -> dict[str, Any]:
    """Return the header of a card as the hub reads it."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def test_the_header_names_base_model_data_sets_and_library() -> None:
    adapter = header(model_card(run_config(), facts(), "adapter"))
    assert (adapter["base_model"], adapter["base_model_relation"]) == ("team/base", "adapter")
    assert (adapter["datasets"], adapter["library_name"]) == (["team/rows"], "peft")
    assert adapter["pipeline_tag"] == "text-generation"
    assert "lora" in adapter["tags"]
    whole = header(model_card(run_config(method="Full", lora=None), facts(), "model"))
    assert (whole["base_model_relation"], whole["library_name"]) == ("finetune", "transformers")


def test_a_base_model_outside_of_the_hub_is_not_in_the_header() -> None:
    card = model_card(run_config(model={"s3": {"uri": "s3://bucket/base"}}), facts(), "model")
    assert "base_model" not in header(card)
    assert "`s3://bucket/base`" in card


def test_the_card_says_what_the_model_was_made_of_and_how_well_it_does() -> None:
    before, after = (
        ScoreRecord(perplexity=9.5, all_token_perplexity=20, scores={"exact": 0.25}),
        ScoreRecord(perplexity=1.5, all_token_perplexity=21.5, scores={"exact": 1}),
    )
    record = EvaluationRecord(rows="Validation", examples=7, base=before, tuned=after, tuned_step=6)
    card = model_card(run_config(), facts(evaluation=record), "adapter")
    for line in (
        "- Name: `team/base`",
        "- Revision: `0123abc`",
        f"- sha256 of its weights: `{'d1' * 32}`",
        "- `dataset.train`: `team/rows`, revision `v1`",
        "- `dataset.validation`: `s3://bucket/rows.jsonl`",
        "- lora.rank: 4",
        "- learningRate: 0.001",
        "- `perplexity`: 1.5 (base model: 9.5)",
        "- `perplexity of all tokens`: 21.5 (base model: 20)",
        "- `exact`: 1 (base model: 0.25)",
        "The perplexity of all tokens counts the prompts too, and may rise where a job learns only the answers.",
        "- Job: `team/job`, uid `uid-1`",
        "- The artifact is the model of optimizer step 6.",
    ):
        assert line in card.splitlines()
    assert "No model was scored." in model_card(run_config(), facts(), "adapter")


def test_no_secret_and_no_free_text_of_the_job_is_in_the_card() -> None:
    storage = run_config().storage.model_copy(update={"uri": "s3://me:password@bucket/runs"})
    card = model_card(run_config(storage=storage), facts(), "adapter")
    assert "password" not in card
    assert "word-of-a-person" not in card
    assert "store.example" not in card


@pytest.mark.parametrize("text", ATTACKS)
def test_a_name_stays_text(text: str) -> None:
    check_inert(text)


@given(st.text(alphabet=st.sampled_from("`~<>[]()!|\\\n\r\t #-*_&;\"'$ae\u2028\u202e"), max_size=40))
def test_any_name_stays_text(text: str) -> None:
    check_inert(text)


def check_inert(text: str) -> None:
    """Assert that a name that a user chose is a code span on its own line, and changes nothing else in the card."""
    plain = model_card(run_config(model={"s3": {"uri": "s3://bucket/NAME"}}), facts(), "model")
    spec = run_config(model={"s3": {"uri": "s3://bucket/NAME"}})
    assert spec.model.s3 is not None
    source = spec.model.s3.model_copy(update={"uri": text})
    changed = spec.model_copy(update={"model": spec.model.model_copy(update={"s3": source})})
    card = model_card(changed, facts(), "model")
    lines, other = plain.split("\n"), card.split("\n")
    assert len(lines) == len(other)
    assert [line for line, wanted in zip(other, lines, strict=True) if line != wanted] == [f"- Name: {code(text)}"]
    assert header(card) == header(plain)
    fence = re.match("`+", code(text))
    assert fence is not None
    inner = code(text)[len(fence[0]) : -len(fence[0])]
    assert not re.search(rf"(?<!`){fence[0]}(?!`)", inner)
