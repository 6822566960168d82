"""An artifact's generation configuration can be loaded and saved, whatever the base model's configuration holds. A base
model whose configuration can't be used is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import utils

from finetune_core.errors import UserError
from finetune_trainer.model.generation_config import ALWAYS, FORMS, SAMPLING, artifact_generation_config
from finetune_trainer.model.trial_generation import TRIED

VOCABULARY = 64
SWITCHES = {
    "do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "token_healing", "low_memory", "disable_compile", "is_assistant", "use_mtp",
    "assistant_early_exit",
}  # fmt: skip
"""Fields that switch something on or off; transformers takes any value."""
OF_THE_CALLER = {
    "cache_implementation", "cache_config", "max_cache_len", "compile_config", "continuous_batching_config",
    "prefill_chunk_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type",
}  # fmt: skip
"""Fields about memory and speed: how the keys and values are kept, and how a second model helps."""
OF_OLDER_VERSIONS = {
    "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",
}  # fmt: skip
"""Fields of ways of generating that transformers no longer contains."""
OWN = {"eos_token_id", "transformers_version", "_from_model_config"}
"""The stop tokens, which are those of the trained model, and fields that transformers writes for itself."""


def test_every_field_that_transformers_knows_has_one_rule() -> None:
    groups = (SAMPLING, ALWAYS, TRIED, FORMS, SWITCHES, OF_THE_CALLER, OF_OLDER_VERSIONS, OWN)
    known = set(vars(GenerationConfig()))
    for name in known:
        assert [name in group for group in groups].count(True) == 1, name
    assert {name for group in groups for name in group} - OF_OLDER_VERSIONS <= known


def written(values: Any, folder: Path, stop_ids: tuple[int, ...] = (1,)) -> tuple[dict[str, Any], str]:
    """Return the generation configuration for an artifact of a base model whose generation configuration is ``values``,
    and the notices about it. The artifact's configuration was saved, loaded, changed and saved again. The changed field
    and the version of transformers are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    config, notices = artifact_generation_config(folder, stop_ids, vocabulary=VOCABULARY)
    config.save_pretrained(folder / "artifact")
    loaded = GenerationConfig.from_pretrained(folder / "artifact")
    loaded.max_new_tokens = 7
    loaded.save_pretrained(folder / "artifact")
    found: dict[str, Any] = json.loads((folder / "artifact" / "generation_config.json").read_text())
    assert found.pop("max_new_tokens") == 7
    found.pop("transformers_version")
    return found, " ".join(notices)


@pytest.mark.parametrize(
    ("values", "artifact", "notice"),
    [
        ({}, {}, ""),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, ""),
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
            "has temperature 0.9, top_p 0.6 without do_sample; the artifact has do_sample true",
        ),
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": False}, "has temperature 0.9, which can't be used"),
        ({"temperature": 0.0, "top_p": 0.9}, {}, "has temperature 0.0, top_p 0.9, which can't be used"),
        ({"temperature": "warm\n# heading"}, {}, "has temperature warm # heading, which can't be used"),
        ({"early_stopping": True, "length_penalty": 2.0}, {}, "has early_stopping, length_penalty with values that"),
        ({"pad_token_id": -1, "top_k": 20}, {"do_sample": True, "top_k": 20}, "has pad_token_id with values that"),
        (
            {"do_sample": True, "temperature": 0, "top_p": 0.9}, {},
            "has temperature 0.0, with which no text can be generated; the artifact has no do_sample",
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": -1}, {"do_sample": True, "temperature": 0.7},
            "has top_k -1, with which no text can be generated; the artifact leaves this out",
        ),
        (
            {"do_sample": True, "temperature": 1e-9}, {},
            "has temperature 1e-09, with which no text can be generated; the artifact has no do_sample",
        ),
        ({"length_penalty": 1e300}, {}, "has length_penalty 1e+300, with which no text can be generated"),
        ({"do_sample": True, "top_k": 5.0, "temperature": 2}, {"do_sample": True, "top_k": 5, "temperature": 2.0}, ""),
        ({"do_sample": True, "temperature": float("nan")}, {"do_sample": True}, "has temperature nan, with which no"),
        ({"do_sample": True, "top_k": 0, "typical_p": 1.0}, {"do_sample": True, "top_k": 0, "typical_p": 1.0}, ""),
        ({"repetition_penalty": "1.1", "num_beams": 0}, {}, "has num_beams 0, repetition_penalty 1.1, with which no"),
        ({"no_repeat_ngram_size": "2"}, {}, "has no_repeat_ngram_size 2, with which no text can be generated"),
        ({"min_length": -1, "max_length": 20.0}, {"max_length": 20}, "has min_length -1, with which no text"),
        ({"exponential_decay_length_penalty": 3}, {}, "has exponential_decay_length_penalty 3, with which no text"),
        ({"exponential_decay_length_penalty": [3, 1.5]}, {"exponential_decay_length_penalty": [3, 1.5]}, ""),
        ({"sequence_bias": "never"}, {}, "has sequence_bias never, with which no text"),
        ({"sequence_bias": [[[999], 1.0]]}, {}, "has sequence_bias [[[999], 1.0]], with which no text"),
        ({"sequence_bias": [[[9], 1.0]]}, {"sequence_bias": [[[9], 1.0]]}, ""),
        ({"bad_words_ids": [[-4]]}, {}, "has bad_words_ids [[-4]], with which no text"),
        ({"suppress_tokens": ["a"]}, {}, "has suppress_tokens ['a'], with which no text"),
        ({"bos_token_id": "w1", "pad_token_id": 3}, {"pad_token_id": 3}, "has bos_token_id w1, with which no text"),
        ({"stop_strings": [3]}, {}, "has stop_strings [3], with which no text"),
        ({"stop_strings": ["end"]}, {"stop_strings": ["end"]}, ""),
        ({"top_k": True}, {}, "has top_k True, which can't be used without do_sample"),
        ({"max_length": 4096, "of_the_publisher": [1]}, {"max_length": 4096, "of_the_publisher": [1]}, ""),
    ],
)  # fmt: skip
def test_what_transformers_does_not_save_is_repaired_and_told(
    values: dict[str, Any], artifact: dict[str, Any], notice: str, tmp_path: Path
) -> None:
    found, notices = written(values, tmp_path)
    assert found == artifact | {"eos_token_id": 1}
    assert notice in notices
    assert bool(notice) == bool(notices)


def test_the_stop_tokens_are_those_of_the_trained_model(tmp_path: Path) -> None:
    assert written({"eos_token_id": 3}, tmp_path, (1, 5, 9))[0] == {"eos_token_id": [1, 5, 9]}


def test_without_a_file_of_its_own_the_configuration_of_the_model_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "temperature": 0.5, "bos_token_id": 7}')
    config, notices = artifact_generation_config(tmp_path, [1], vocabulary=VOCABULARY)
    assert (config.bos_token_id, config.eos_token_id) == (7, 1)
    config.save_pretrained(tmp_path / "artifact")
    assert len(notices) == (config.temperature == 0.5)


def test_the_trial_draws_no_random_number(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    written({"suppress_tokens": [3], "sequence_bias": "never"}, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trial_waits_for_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO-3 on several ranks, transformers generates on all ranks together by default, and rank 0 alone
    exports."""
    monkeypatch.setattr(utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(utils, "_get_torch_distributed_world_size", lambda: 2)
    assert written({"pad_token_id": 3, "suppress_tokens": [4]}, tmp_path)[1] == ""


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 100),
    st.floats(-1, 3),
    st.sampled_from(["", "a", "static", "never"]),
    st.lists(st.integers(-2, 100) | st.floats(-1, 3) | st.just("a") | st.lists(st.integers(-2, 100), max_size=2)),
)
FIELDS = [
    *SAMPLING, *ALWAYS, *TRIED, *FORMS, "do_sample",
    "eos_token_id", "use_cache", "cache_implementation", "output_scores", "other",
]  # fmt: skip


def generate(values: dict[str, Any]) -> None:
    """Generate a short text with a tiny model and the generation configuration ``values``. Fields for which a caller
    must also pass a tokenizer, or that concern memory and speed, are left out."""
    ruled = {
        name: value
        for name, value in values.items()
        if name not in OF_THE_CALLER | OF_OLDER_VERSIONS | OWN | {"stop_strings"}
    }
    beams = int(ruled.get("num_beams", 1))
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        )
    )  # fmt: skip
    short = {"max_new_tokens": 4, "min_new_tokens": 0, "num_return_sequences": min(beams, 2)}
    config = GenerationConfig(**{"pad_token_id": 0} | ruled | short, eos_token_id=[1, 2])
    assert len(model.generate(torch.tensor([[3, 4]]), generation_config=config)) == short["num_return_sequences"]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_any_configuration_is_exported_or_bad_input(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    problem = ""
    found: dict[str, Any] = {}
    try:
        found, _ = written(values, tmp_path_factory.mktemp("generation"), (1, 2))
    except UserError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("model: its generation_config.json can't be used: ")
    else:
        assert found["eos_token_id"] == [1, 2]
        if found.get("num_beams", 1) < 5:
            generate(found)


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"', "{", "", "\ufeff{}"])
def test_a_file_that_is_no_configuration_is_bad_input(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^model: its generation_config\.json can't be used"):
        artifact_generation_config(tmp_path, [1], vocabulary=VOCABULARY)
