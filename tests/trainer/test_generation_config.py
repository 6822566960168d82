"""An artifact's generation configuration can be loaded and saved, whatever the base model's configuration holds. A base
model whose configuration can't be used is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from finetune_core.errors import UserError
from finetune_trainer.model.generation_config import SAMPLING, artifact_generation_config


def written(values: Any, folder: Path, stop_ids: tuple[int, ...] = (1,)) -> tuple[dict[str, Any], str]:
    """Return the generation configuration for an artifact of a base model whose generation configuration is ``values``,
    and the notices about it. The artifact's configuration was saved, loaded, changed and saved again. The changed field
    and the version of transformers are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    config, notices = artifact_generation_config(folder, stop_ids)
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
        ({"do_sample": True, "top_k": 5.0, "temperature": 2}, {"do_sample": True, "top_k": 5, "temperature": 2.0}, ""),
        ({"do_sample": True, "temperature": float("nan")}, {"do_sample": True}, "has temperature nan, with which no"),
        ({"do_sample": True, "top_k": 0, "typical_p": 1.0}, {"do_sample": True, "top_k": 0, "typical_p": 1.0}, ""),
        ({"repetition_penalty": "1.1", "num_beams": 0}, {}, "has num_beams 0, repetition_penalty 1.1, with which no"),
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
    config, notices = artifact_generation_config(tmp_path, [1])
    assert (config.bos_token_id, config.eos_token_id) == (7, 1)
    config.save_pretrained(tmp_path / "artifact")
    assert len(notices) == (config.temperature == 0.5)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 100),
    st.floats(-1, 3),
    st.sampled_from(["", "a", "static", "never"]),
)
FIELDS = [
    *SAMPLING, "do_sample", "num_beams", "early_stopping", "length_penalty", "pad_token_id", "eos_token_id",
    "use_cache", "cache_implementation", "num_return_sequences", "max_new_tokens", "output_scores", "other",
]  # fmt: skip


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


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"', "{", "", "\ufeff{}"])
def test_a_file_that_is_no_configuration_is_bad_input(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^model: its generation_config\.json can't be used"):
        artifact_generation_config(tmp_path, [1])
