"""An artifact's generation configuration can be loaded and saved, whatever the base model's configuration holds. A base
model whose configuration can't be used is refused."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import utils

from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import save_text_files
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.generation_config import (
    ALWAYS,
    BOOKKEEPING,
    FORMS,
    SAMPLING,
    SMALLEST,
    SWITCHES,
    TOKENS,
    artifact_generation_config,
)
from finetune_trainer.pod.errors import one_line
from tests.trainer import tiny
from tests.trainer.exporting import options_of

VOCABULARY = 64
JUDGED_BY_THE_TRIAL = {
    "bad_words_ids", "begin_suppress_tokens", "early_stopping", "sequence_bias", "suppress_tokens",
    "watermarking_config", "cache_implementation", "compile_config", "dola_layers", "constraints", "force_words_ids",
}  # fmt: skip
"""Fields without a rule of their own. transformers refuses wrong values when it loads, saves or generates."""
OWN = {"eos_token_id", *BOOKKEEPING}
"""The stop tokens, which are those of the trained model, and fields that transformers writes for itself."""
DECLARED = sorted(vars(GenerationConfig()))


def test_every_field_that_transformers_knows_has_one_rule() -> None:
    groups = (SAMPLING, ALWAYS, FORMS, TOKENS, JUDGED_BY_THE_TRIAL, OWN)
    for name in DECLARED:
        assert [name in group for group in groups].count(True) == 1, name
    assert {name for group in groups for name in group} <= set(DECLARED)


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
            {"do_sample": True, "temperature": 1e-40}, {},
            "has temperature 1e-40, with which no text can be generated; the artifact has no do_sample",
        ),
        ({"do_sample": True, "temperature": SMALLEST}, {"do_sample": True, "temperature": SMALLEST}, ""),
        ({"do_sample": True, "temperature": 1e300}, {"do_sample": True}, "has temperature 1e+300, with which no text"),
        ({"do_sample": True, "temperature": 10**400}, {"do_sample": True}, "has temperature 1000000"),
        ({"top_k": 10**400}, {}, "has top_k 1000000"),
        ({"max_length": 1e300, "min_length": 1e30}, {}, "has max_length 1e+300, min_length 1e+30, with which no text"),
        ({"of_the_publisher": {"a": [10**30]}}, {}, "other programs can't read"),
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
        ({"pad_token_id": VOCABULARY}, {}, "has pad_token_id 64, with which no text can be generated"),
        ({"do_sample": 1, "top_k": 5}, {"do_sample": True, "top_k": 5}, "has do_sample 1, with which no text"),
        ({"use_cache": "no", "output_scores": 1}, {}, "has output_scores 1, use_cache no, with which no text"),
        ({"save_pretrained": 1, "__class__": 2}, {}, "has __class__, save_pretrained, which transformers uses"),
        ({"self": 1, "defaults_only": True, "a\nb": 2}, {"a\nb": 2}, "has defaults_only, self, which trans"),
        ({"penalty_alpha": 0.6, "top_k": 4}, {"do_sample": True, "top_k": 4}, "has penalty_alpha 0.6, with which no"),
        (
            {"do_sample": True, "sequence_bias": [[[0], 1e300]]}, {"do_sample": True},
            "has sequence_bias [[[0], 1e+300]], with which no text can be generated",
        ),
        ({"dola_layers": "low"}, {}, "has dola_layers low, with which no text can be generated"),
        ({"constraints": [], "use_mtp": True}, {}, "has constraints [], use_mtp True, with which no text"),
        ({"num_beams": 2, "low_memory": True}, {"num_beams": 2}, "has low_memory True, with which no text"),
        ({"is_assistant": True}, {}, "has is_assistant True, with which no text can be generated"),
        ({"prompt_lookup_num_tokens": 2.5}, {}, "has prompt_lookup_num_tokens 2.5, with which no text"),
        ({"prompt_lookup_num_tokens": 2}, {"prompt_lookup_num_tokens": 2}, ""),
        ({"prefill_chunk_size": 0}, {}, "has prefill_chunk_size 0, with which no text can be generated"),
        ({"cache_implementation": "offloaded"}, {"cache_implementation": "offloaded"}, ""),
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


@pytest.mark.parametrize(
    ("config", "logits"),
    [
        ({"vocab_size": 90}, 90),
        ({"vocab_size": 500, "text_config": {"vocab_size": 90}}, 90),
        ({"vocab_size": 500, "text_config": {}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_token_without_a_logit_is_left_out(config: object, logits: int | None, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    (base / "config.json").unlink()
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))
    largest = (logits or len(tokenizer)) - 1
    for token in (largest, largest + 1):
        (base / "generation_config.json").write_text(json.dumps({"pad_token_id": token}))
        notices = save_text_files(tmp_path / "artifact", tokenizer, options_of(base, names=None))
        found = GenerationConfig.from_pretrained(tmp_path / "artifact").pad_token_id
        assert (found, bool(notices)) == ((token, False) if token == largest else (None, True))


def test_names_that_are_no_fields_do_not_count_in_the_configuration_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "update": 1, "self": 2, "_commit_hash": ""}')
    config, notices = artifact_generation_config(tmp_path, [1], vocabulary=VOCABULARY)
    config.save_pretrained(tmp_path / "artifact")
    assert notices == []


def test_the_trial_draws_no_random_number(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    written({"suppress_tokens": [3], "sequence_bias": "never", "do_sample": True, "top_k": 5}, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trial_uses_neither_the_default_device_nor_the_default_type(tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 1e-6, "suppress_tokens": [3], "dola_layers": "low"}
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        found, notices = written(values, tmp_path)
        defaults = (torch.get_default_device().type, torch.get_default_dtype())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert defaults == ("meta", torch.float16)
    assert found == {"do_sample": True, "temperature": 1e-6, "suppress_tokens": [3], "eos_token_id": 1}
    assert "dola_layers" in notices


def test_the_trial_waits_for_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO-3 on several ranks, transformers generates on all ranks together by default, and rank 0 alone
    exports."""
    monkeypatch.setattr(utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(utils, "_get_torch_distributed_world_size", lambda: 2)
    assert written({"pad_token_id": 3, "suppress_tokens": [4]}, tmp_path)[1] == ""


NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.floats(-1, 3),
    st.sampled_from([10**400, -(10**30), 2**63, 2**62, 1e-30, 1e300, math.nan, math.inf, -math.inf, 5.0]),
)
TEXTS = st.sampled_from([
    "", "a", "1", "never", "static", "dynamic", "offloaded", "offloaded_static", "quantized", "paged", "constant",
    "heuristic", "dflash", "low", "\ud800", "a\nb",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.just("dtype"), inner, max_size=2),
    max_leaves=4,
)
METHODS = sorted({*dir(GenerationConfig), *inspect.signature(GenerationConfig.update).parameters})
UNKNOWN = ["of_the_publisher", "", "a\nb", "\ud800", "__deepcopy__", "_mask_length", "synced_gpus", "dtype"]
NAMES = st.one_of(
    st.sampled_from(DECLARED),
    st.sampled_from(DECLARED),
    st.sampled_from(sorted(JUDGED_BY_THE_TRIAL | {"use_mtp", "is_assistant", "low_memory", "num_beams", "do_sample"})),
    st.sampled_from(sorted(SAMPLING)),
    st.sampled_from([*METHODS, *UNKNOWN]),
)
OWN_TYPE: dict[str, st.SearchStrategy[Any]] = {
    **{name: NUMBERS | st.floats(0, 1) for name in (*SAMPLING, *ALWAYS)},
    **{name: st.booleans() for name in SWITCHES},
    **{name: st.integers(0, VOCABULARY) for name in TOKENS},
    "bad_words_ids": st.lists(st.lists(st.integers(-1, VOCABULARY), max_size=2), max_size=3),
    "sequence_bias": st.lists(st.tuples(st.lists(st.integers(-1, VOCABULARY), max_size=2), NUMBERS), max_size=2),
    "suppress_tokens": st.lists(st.integers(-1, VOCABULARY)),
    "begin_suppress_tokens": st.lists(st.integers(-1, VOCABULARY)),
    "watermarking_config": st.fixed_dictionaries(
        {},
        optional={
            "bias": NUMBERS, "greenlist_ratio": st.floats(0, 1), "hashing_key": NUMBERS,
            "seeding_scheme": st.sampled_from(["lefthash", "selfhash"]), "context_width": NUMBERS,
        },
    ),
    "exponential_decay_length_penalty": st.lists(NUMBERS, min_size=2, max_size=2),
    "early_stopping": st.booleans() | st.just("never"),
    "constraints": st.lists(st.integers(0, VOCABULARY), max_size=2),
    "force_words_ids": st.lists(st.lists(st.integers(0, VOCABULARY), max_size=2), max_size=2),
    "dola_layers": st.sampled_from(["low", "high"]) | st.lists(st.integers(0, 2), max_size=2),
    "cache_implementation": st.sampled_from(["static", "offloaded", "offloaded_static", "dynamic", "quantized"]),
}  # fmt: skip
FILES = st.lists(
    NAMES.flatmap(lambda name: st.tuples(st.just(name), OWN_TYPE.get(name, VALUES) | VALUES)), min_size=1, max_size=5
)


def generate(folder: Path) -> None:
    """Generate two tokens with a tiny model that has the generation configuration in ``folder``. Fields for which a
    caller must also pass a tokenizer are left out, and fields that ask for memory or a GPU get a smaller value."""
    values = json.loads((folder / "generation_config.json").read_text())
    for name in ("stop_strings", "token_healing", "max_time"):
        values.pop(name, None)
    if str(values.get("cache_implementation")).startswith("offloaded"):
        del values["cache_implementation"]
    for name in ("num_beams", "max_cache_len"):
        if name in values:
            values[name] = min(values[name], 4)
    (folder / "generation_config.json").write_text(json.dumps(values))
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=1.0,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.generation_config.num_return_sequences = None
    # Callers want the same text each time, whatever the configuration says, for example for an evaluation.
    for call in ({}, {"do_sample": False}):
        answers = model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, **call)
        shape = (answers if isinstance(answers, torch.Tensor) else answers.sequences).shape
        assert shape[0] == 1
        assert 2 < shape[1] <= 4


@settings(max_examples=200)
@given(FILES.map(dict))
def test_any_configuration_generates_or_is_bad_input(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("generation")
    problem = ""
    found: dict[str, Any] = {}
    notices = ""
    try:
        found, notices = written(values, folder, (1, 2))
    except UserError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("model: its generation_config.json can't be used: ")
        return
    assert found["eos_token_id"] == [1, 2]
    generate(folder / "artifact")
    # Fields that begin with an underscore are transformers' own, and it drops unknown fields beside one of them.
    dropped = {name for name, value in values.items() if value is not None} - {*found, *OWN, *SAMPLING, "do_sample"}
    if not values.get("_from_model_config"):
        for name in dropped - {"_commit_hash", "_original_object_hash", "_mask_length", "max_new_tokens"}:
            assert one_line(name) in notices


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"', "{", "", "\ufeff{}"])
def test_a_file_that_is_no_configuration_is_bad_input(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^model: its generation_config\.json can't be used"):
        artifact_generation_config(tmp_path, [1], vocabulary=VOCABULARY)
