"""The identity of prepared examples changes with everything that decides the examples, and with nothing else."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import finetune_trainer
from finetune_trainer.data.dataset import LengthLimit
from finetune_trainer.data.prepared import example_identity
from finetune_trainer.data.tokenizer import load_tokenizer
from tests.trainer import tiny
from tests.trainer.prepared import FIELD, dataset_of, write_tokenizer

DATASET = dataset_of(tiny.PROMPT_COMPLETION, badRows="Skip")


@pytest.fixture
def given_identity(tmp_path: Path) -> Callable[..., str | None]:
    """Return a function that returns an identity, with changes of the arguments."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(3, seed=1))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))

    def identity(**changes: Any) -> str | None:
        arguments: dict[str, Any] = {
            "data": example_identity.data_identity(path),
            "source": "rows",
            "field": FIELD,
            "dataset": DATASET,
            "tokenizer": tokenizer,
            "limit": LengthLimit(12, "dataset.maxLength 12", 60),
            "columns": {"question", "reply"},
            "keep_rows": False,
            "added_tokens": [],
            "ends": [1],
            "today": date(2026, 11, 30),
        }
        return example_identity.example_identity(**(arguments | changes))

    return identity


def other_tokenizer(folder: Path, change: Callable[[Any], object]) -> Any:
    tokenizer = load_tokenizer(write_tokenizer(folder))
    change(tokenizer)
    return tokenizer


def test_the_identity_changes_with_everything_that_decides_the_examples(
    given_identity: Callable[..., str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = given_identity()
    assert same is not None
    assert given_identity() == same
    assert given_identity(tokenizer=other_tokenizer(tmp_path / "same", lambda _: None)) == same
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(tmp_path / "rows.jsonl", copy)
    data = example_identity.data_identity
    assert given_identity(data=data(copy)) == same, "the folder of a file makes no difference"
    (tmp_path / "more").mkdir()
    more = tiny.write_jsonl(tmp_path / "more" / "rows.jsonl", tiny.rows(3, seed=2))
    changes: list[dict[str, Any]] = [
        {"data": data(more)},
        {"data": data(tiny.write_jsonl(tmp_path / "other-name.jsonl", tiny.rows(3, seed=1)))},
        {"source": "others"},
        {"field": "dataset.test"},
        {"dataset": dataset_of({"text": {"textField": "reply"}}, badRows="Skip")},
        {"dataset": dataset_of(tiny.PROMPT_COMPLETION, badRows="Fail")},
        {"dataset": dataset_of(tiny.PROMPT_COMPLETION, badRows="Skip", longRows="Skip")},
        {"limit": LengthLimit(13, "dataset.maxLength 12", 60)},
        {"limit": LengthLimit(12, "the model's context of 12", 60)},
        {"limit": LengthLimit(12, "dataset.maxLength 12", None)},
        {"columns": {"question"}},
        {"keep_rows": True},
        {"added_tokens": ["w1"]},
        {"ends": [1, 2]},
        {"tokenizer": other_tokenizer(tmp_path / "a", lambda each: each.add_tokens(["w99"]))},
        {"tokenizer": other_tokenizer(tmp_path / "b", lambda each: setattr(each, "chat_template", "{{ messages }}"))},
        {"tokenizer": other_tokenizer(tmp_path / "c", lambda each: setattr(each, "eos_token", "ask"))},
        {"tokenizer": other_tokenizer(tmp_path / "d", lambda each: setattr(each, "split_special_tokens", True))},
        {"tokenizer": other_tokenizer(tmp_path / "e", lambda each: setattr(each, "extra_special_tokens", ["w1"]))},
    ]
    found = [same, *(given_identity(**change) for change in changes)]
    monkeypatch.setattr(example_identity, "code_identity", lambda: "another version")
    found.append(given_identity())
    assert len({each for each in found if each is not None}) == len(changes) + 2


def test_the_date_is_part_of_the_identity_only_where_rows_may_show_it(
    given_identity: Callable[..., str | None], tmp_path: Path
) -> None:
    dated = other_tokenizer(
        tmp_path / "dated", lambda each: setattr(each, "chat_template", "{{ strftime_now('%Y') }}{{ messages }}")
    )
    days = [{"today": date(2026, 11, 30)}, {"today": date(2026, 12, 1)}]
    chat = dataset_of({"messages": {}})
    assert len({given_identity(**day) for day in days}) == 1
    assert len({given_identity(**day, dataset=chat) for day in days}) == 1
    assert len({given_identity(**day, tokenizer=dated) for day in days}) == 1
    assert len({given_identity(**day, tokenizer=dated, dataset=chat) for day in days}) == 2


def test_without_the_date_of_the_run_rows_that_may_show_a_date_have_no_identity(
    given_identity: Callable[..., str | None], tmp_path: Path
) -> None:
    """Examples that were rendered before midnight must not be used after it."""
    template = "{{ strftime_now('%Y') }}{{ messages }}"
    dated = other_tokenizer(tmp_path / "dated", lambda each: setattr(each, "chat_template", template))
    chat = dataset_of({"messages": {}})
    assert given_identity(today=None, tokenizer=dated, dataset=chat) is None
    assert given_identity(today=None, tokenizer=dated) == given_identity(tokenizer=dated) is not None
    assert given_identity(today=None, dataset=chat) == given_identity(dataset=chat) is not None


def test_the_code_that_decides_the_examples_is_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = example_identity.code_identity.__wrapped__()
    assert before == example_identity.code_identity()
    installed = list(importlib.metadata.distributions())
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed[1:])
    assert example_identity.code_identity.__wrapped__() != before
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed[::-1])
    assert example_identity.code_identity.__wrapped__() == before
    (tmp_path / "finetune_trainer" / "data").mkdir(parents=True)
    (tmp_path / "finetune_trainer" / "data" / "new.py").write_text("")
    monkeypatch.setattr(finetune_trainer, "__file__", str(tmp_path / "finetune_trainer" / "__init__.py"))
    assert example_identity.code_identity.__wrapped__() != before


def test_a_tokenizer_without_a_stored_form_has_no_identity(
    given_identity: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        is_fast = False

    assert given_identity(tokenizer=Slow()) is None
