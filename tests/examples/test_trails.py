"""examples/trails generates the same rows in every call with the same seed. No training row has both the function and
the attributes of a held-out row, even with other values of the attributes. No training row has the name of a held-out
row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.trails.generate import PHRASES, SENTENCES, VALUES, generate, main

MEANING = re.compile(r"(\w+)\(((?:\w+\[[^\]]+\](?:, )?)+)\)")


def parsed(meaning: str) -> tuple[str, dict[str, str]]:
    """Split a row's meaning, such as `function(attribute[value], ...)`, into its function and its attributes with
    values."""
    match = MEANING.fullmatch(meaning)
    assert match, meaning
    return match[1], dict(re.findall(r"(\w+)\[([^\]]+)\]", match[2]))


def shape(meaning: str) -> tuple[str, tuple[str, ...]]:
    """Return the function and the names of the attributes in a row's meaning, without values."""
    function, attributes = parsed(meaning)
    return function, tuple(attributes)


def test_the_same_seed_gives_the_same_rows() -> None:
    assert generate(7) == generate(7)
    assert generate(7) != generate(8)


def test_the_sets_have_the_asked_sizes() -> None:
    rows = generate()
    assert (len(rows.train), len(rows.validation), len(rows.heldout)) == (800, 60, 40)


@pytest.mark.parametrize("seed", range(10))
def test_held_out_combinations_never_occur_in_training(seed: int) -> None:
    rows = generate(seed)
    trained = [row["meaning"] for row in rows.train]
    shapes = {shape(meaning) for meaning in trained}
    names = {parsed(meaning)[1]["name"] for meaning in trained}
    for row in rows.heldout:
        assert shape(row["meaning"]) not in shapes
        assert parsed(row["meaning"])[1]["name"] not in names


@pytest.mark.parametrize("seed", range(10))
def test_no_meaning_occurs_twice(seed: int) -> None:
    rows = generate(seed)
    meanings = [row["meaning"] for row in [*rows.train, *rows.validation, *rows.heldout]]
    assert len(set(meanings)) == len(meanings)


@pytest.mark.parametrize("seed", range(10))
def test_all_words_of_held_out_rows_occur_in_training(seed: int) -> None:
    rows = generate(seed)
    trained = {word for row in rows.train for word in re.findall(r"\w+", row["sentence"])}
    assert {word for row in rows.heldout for word in re.findall(r"\w+", row["sentence"])} <= trained


def test_every_function_and_attribute_is_trained() -> None:
    found = [parsed(row["meaning"]) for row in generate().train]
    assert {function for function, _ in found} == set(SENTENCES)
    assert {attribute for _, attributes in found for attribute in attributes} == {"name", *VALUES}


def test_a_sentence_says_what_its_meaning_says() -> None:
    for row in generate().train:
        function, attributes = parsed(row["meaning"])
        assert function in SENTENCES
        assert attributes["name"] in row["sentence"]
        for attribute in PHRASES.keys() & attributes.keys():
            assert attributes[attribute] in row["sentence"]


def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "rows"), "--train", "80", "--seed", "3"]) == 0
    lines = {file.name: file.read_text().splitlines() for file in (tmp_path / "rows").iterdir()}
    assert {name: len(found) for name, found in lines.items()} == {
        "train.jsonl": 80,
        "validation.jsonl": 60,
        "heldout.jsonl": 40,
    }
    assert json.loads(lines["train.jsonl"][0]).keys() == {"sentence", "meaning"}
    assert "80 training" in capsys.readouterr().out
