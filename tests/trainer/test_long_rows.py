"""With `longRows` Split, a text that is too long is split into examples, in which each token of the text except the
first is learned once. With Truncate, the text is cut off. In both cases there is a notice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetSpec
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.examples import Example
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.long_rows import split, truncated
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from tests.trainer import tiny


@given(st.integers(1, 200), st.integers(2, 40))
def test_the_pieces_of_a_text_learn_each_token_but_the_first_once(length: int, most: int) -> None:
    whole = Example(tuple(range(length)), ((0, length),))
    pieces = split(whole, most)
    assert all(len(piece.ids) <= most for piece in pieces)
    learned = [piece.ids[at] for piece in pieces for first, last in piece.spans for at in range(max(first, 1), last)]
    assert learned == list(range(1, length))
    assert sum(piece.supervised_tokens for piece in pieces) == whole.supervised_tokens
    for before, after in itertools.pairwise(pieces):
        assert before.ids[-1] == after.ids[0]


def test_a_text_is_cut_at_its_limit() -> None:
    assert truncated(Example((5, 6, 7, 8), ((0, 4),)), 3) == Example((5, 6, 7), ((0, 3),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("policy", ["Split", "Truncate"])
def test_the_control_tokens_of_a_long_text_are_counted_too(policy: str, tokenizer: Any) -> None:
    source = {"s3": {"uri": "s3://finetune/train.jsonl"}}
    dataset = DatasetSpec.model_validate({"train": source, "format": {"text": {}}, "maxLength": 8, "longRows": policy})
    _, notices = make_examples(
        [Row(1, {"text": f"w1 {tokenizer.eos_token} " * 9})],
        "s3://finetune/train.jsonl",
        "dataset.train",
        dataset,
        tokenize_functions(tokenizer),
        limit=length_limit(dataset, None),
    )
    assert any(
        notice.startswith("dataset.train: 1 row has control tokens of the model in the text") for notice in notices
    )


@pytest.mark.parametrize(
    ("policy", "lengths", "notice"),
    [
        (
            "Split",
            [3, 8, 8, 7],
            "1 row is longer than 8 tokens and split into 3 examples, which learn each of the 21 tokens once",
        ),
        ("Truncate", [3, 8], "1 row is longer than 8 tokens and cut to 8 tokens; 13 of the 21 tokens are left out"),
    ],
)
def test_long_texts_are_counted_in_a_notice(policy: str, lengths: list[int], notice: str, tokenizer: Any) -> None:
    source = {"s3": {"uri": "s3://finetune/train.jsonl"}}
    dataset = DatasetSpec.model_validate({"train": source, "format": {"text": {}}, "maxLength": 8, "longRows": policy})
    rows = [Row(1, {"text": "w1 w2"}), Row(2, {"text": " ".join(f"w{number}" for number in range(20))})]
    examples, notices = make_examples(
        rows,
        "s3://finetune/train.jsonl",
        "dataset.train",
        dataset,
        tokenize_functions(tokenizer),
        limit=length_limit(dataset, None),
    )
    assert list(examples.lengths) == lengths
    assert notices == [f"dataset.train: {notice} (longRows: {policy}); the first: s3://finetune/train.jsonl line 2"]
