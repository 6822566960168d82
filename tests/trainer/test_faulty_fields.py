"""Where a library fails with a JSON file of a model, the sentence for the user names the field and its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.configuration import load_configuration
from finetune_trainer.model.generation_config import artifact_generation_config
from finetune_trainer.model.structure import read_structure
from finetune_trainer.pod.errors import first_line
from finetune_trainer.pod.faulty_field import LONGEST_SECONDS, MOST_TRIALS, faulty_field
from tests.trainer.families import write_family


def names_of(document: Mapping[str, Any]) -> set[str]:
    return set(document).union(*(names_of(value) for value in document.values() if isinstance(value, dict)))


DOCUMENTS = st.dictionaries(
    st.sampled_from("abcd"), st.integers() | st.dictionaries(st.sampled_from("efgh"), st.integers(), max_size=3)
)


@given(DOCUMENTS, st.sampled_from("abcdefgh"))
def test_the_field_without_which_a_document_loads_is_found(document: dict[str, Any], wrong: str) -> None:
    found = faulty_field(document, lambda trial: wrong not in names_of(trial))
    if wrong not in names_of(document):
        assert (found is None) == (not document)
    elif sum(wrong in names_of({key: value}) for key, value in document.items()) == 1:
        assert found is not None
        assert found.path.split(".")[-1] == wrong
    else:
        assert found is None


def test_a_field_that_the_message_names_is_tried_before_the_others() -> None:
    document = {"vocab_size": 1, "a": "first", "b": {"c": "superlu"}}
    assert faulty_field(document, lambda trial: trial != document, "KeyError: 'superlu'") == ("b.c", "superlu")
    assert faulty_field(document, lambda trial: trial != document) == ("a", "first")
    assert faulty_field({"vocab_size": 1, "a": 0}, lambda trial: trial.get("a") == 1) == ("a", 0)


def test_trials_end_after_a_number_and_after_a_time() -> None:
    trials: list[Any] = []

    def fails(trial: Mapping[str, Any]) -> bool:
        trials.append(trial)
        return False

    document = {str(number): "x" for number in range(5 * MOST_TRIALS)}
    assert faulty_field(document, fails) is None
    assert len(trials) == MOST_TRIALS
    trials.clear()
    clock = iter([0.0, 1.0, LONGEST_SECONDS, LONGEST_SECONDS + 1])
    assert faulty_field(document, fails, now=lambda: next(clock)) is None
    assert len(trials) == 2


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "type of positions": (
        "config.json",
        {"rope_scaling": {"type": "of-tomorrow", "factor": 2.0}},
        "model: its files can't be loaded: `rope_scaling.type` of config.json is 'of-tomorrow', with which",
    ),
    "activation": (
        "config.json",
        {"hidden_act": "superlu"},
        "model: its files can't be loaded: `hidden_act` of config.json is 'superlu', with which transformers fails: ",
    ),
    "part beside a llama": (
        "config.json",
        {"text_config": {"vocab_size": 9}},
        "model: its files can't be loaded: `text_config` of config.json is {'vocab_size': 9}, with which",
    ),
    "part that is a list": (
        "config.json",
        {"text_config": [1]},
        "model: its files can't be loaded: `text_config` of config.json is [1], with which transformers fails: ",
    ),
    "no heads": (
        "config.json",
        {"num_attention_heads": 0},
        "model: its config.json can't be used: `num_attention_heads` of config.json is 0, with which",
    ),
    "padding": (
        "config.json",
        {"pad_token_id": 64},
        "model: its files can't be loaded: `pad_token_id` of config.json is 64, with which transformers fails: Padding",
    ),
    "labels": (
        "config.json",
        {"id2label": {"x": "a"}},
        "model: its config.json can't be used: `id2label.x` of config.json is 'a', with which transformers fails: ",
    ),
    "vocabulary": (
        "config.json",
        {"vocab_size": 10**18},
        "model: its files can't be loaded: `vocab_size` of config.json is 1000000000000000000, with which",
    ),
    **{
        f"end {value!r}": (
            "config.json",
            {"eos_token_id": value},
            "model: its config.json can't be used: eos_token_id must be a token id or a list of token ids, and is"
            f" {str(value)!r}",
        )
        for value in ("1", 1.0, [1, None])
    },
    "padding as a text": (
        "generation_config.json",
        {"pad_token_id": "1"},
        "model: its generation_config.json can't be used: `pad_token_id` of generation_config.json is '1', with which",
    ),
    "longest text": (
        "tokenizer_config.json",
        {"model_max_length": "long"},
        "model: its tokenizer can't be used: `model_max_length` of tokenizer_config.json is 'long', with which",
    ),
    "class": (
        "tokenizer_config.json",
        {"tokenizer_class": 5},
        "model: its tokenizer can't be loaded: `tokenizer_class` of tokenizer_config.json is 5, with which",
    ),
    "class of another tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer"},
        "model: its tokenizer can't be loaded: `tokenizer_class` of tokenizer_config.json is 'T5Tokenizer', with which",
    ),
}


def finding(folder: Path) -> str:
    try:
        load_configuration(folder, "model")
        load_tokenizer(folder)
        read_structure(folder)
        artifact_generation_config(folder, [1], vocabulary=64)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", WRONG)
def test_a_field_with_which_a_library_fails_is_named_with_its_value(name: str, tmp_path: Path) -> None:
    file, fields, sentence = WRONG[name]
    path = write_family("llama-2", tmp_path) / file
    path.write_text(json.dumps((json.loads(path.read_bytes()) if path.exists() else {}) | fields))
    found = finding(tmp_path)
    assert found.startswith(sentence)
    assert "\n" not in found


def test_a_tokenizer_that_holds_a_list_is_named_by_its_file(tmp_path: Path) -> None:
    (write_family("llama-2", tmp_path) / "tokenizer.json").write_text("[1]")
    assert finding(tmp_path) == "model: its tokenizer can't be used: tokenizer.json must be a JSON object"


@pytest.mark.parametrize("name", ["x y\n", "9" * 5000])
def test_a_field_with_a_name_of_any_form_is_named_in_one_short_line(name: str, tmp_path: Path) -> None:
    write_family("llama-2", tmp_path)
    path = tmp_path / "config.json"
    wrong = {"per_layer_config": {name: {"head_dim": 16}} if name.isdigit() else {"0": {name: 1}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(UserError) as caught:
        load_configuration(tmp_path, "model")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700


def test_a_long_message_is_cut_between_two_words() -> None:
    line = first_line(ValueError("word " * 100), limit=23)
    assert line == "word word word word…"
    assert first_line(ValueError("x" * 100), limit=20) == "x" * 19 + "…"
    assert first_line(ValueError("all of it"), limit=9) == "all of it"
