"""Prepared examples are kept in a folder under the identity of everything that decides them. Whatever is damaged, or
comes from somebody who does not know the key, is made again and never believed. Several writers do not harm each
other."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_trainer
from finetune_trainer.data.dataset import LengthLimit, length_limit
from finetune_trainer.data.files.index import DataFile, write_index
from finetune_trainer.data.prepared import example_folder, example_identity
from finetune_trainer.data.prepared.chunk_workers import ChunkWorkers
from finetune_trainer.data.prepared.example_folder import (
    FILES,
    SEAL_FILE,
    Obtained,
    load_examples,
    obtain_examples,
)
from finetune_trainer.data.prepared.prepared_rows import PreparedRows, prepare_rows
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from finetune_trainer.pod.errors import OutsideFailure
from tests.trainer import tiny
from tests.trainer.prepared import FIELD, dataset_of, write_tokenizer

KEY = b"a secret of the job"
IDENTITY = "a" * 64
DATASET = dataset_of(tiny.PROMPT_COMPLETION, badRows="Skip")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedRows:
    """Examples of two files, of which one row is bad."""
    folder = tmp_path_factory.mktemp("made")
    files = [tiny.write_jsonl(folder / f"{n}.jsonl", [*tiny.rows(9, seed=n), {"question": "w1"}]) for n in (1, 2)]
    write_index(folder, [DataFile(path, path.name, f"s3://bucket/{path.name}") for path in files])
    tokenize = tokenize_functions(load_tokenizer(write_tokenizer(folder)))
    limit = length_limit(DATASET, None)
    return prepare_rows(read_rows(folder, FIELD), "rows", FIELD, DATASET, tokenize, limit=limit, keep_rows=True)


def values(prepared: PreparedRows) -> object:
    """Return everything that a folder keeps, in a form that can be compared."""
    origins = prepared.origins
    examples = prepared.examples
    return (
        (examples.digest, examples.digest_with_rows, list(examples.rows), prepared.notices, prepared.rows),
        (list(origins.files), list(origins.file), list(origins.number)),
    )


class Making:
    """Returns the examples, and counts how often it was asked."""

    def __init__(self, made: PreparedRows) -> None:
        self.made, self.count, self._lock = made, 0, threading.Lock()

    def __call__(self) -> PreparedRows:
        with self._lock:
            self.count += 1
        return self.made


def obtained(make: Making, target: Path, cache: Path | None, key: bytes = KEY, identity: str = IDENTITY) -> Obtained:
    """Obtain the examples, and check that they are the right ones and that nothing unfinished is left behind."""
    found = obtain_examples(identity, make, target, cache=cache, key=key)
    assert values(found.prepared) == values(make.made)
    for folder in (target.parent, cache):
        assert folder is None or not folder.is_dir() or not list(folder.glob(".unfinished-*"))
    return found


def test_examples_are_made_once(made: PreparedRows, tmp_path: Path) -> None:
    make = Making(made)
    assert made.notices
    assert not obtained(make, tmp_path / "node-1" / "train", tmp_path / "cache").from_cache
    assert obtained(make, tmp_path / "node-1" / "train", tmp_path / "cache").from_cache
    assert obtained(make, tmp_path / "node-2" / "train", tmp_path / "cache").from_cache
    assert make.count == 1


def test_without_a_cache_or_an_identity_examples_are_made_each_time(made: PreparedRows, tmp_path: Path) -> None:
    make = Making(made)
    for number in (1, 2):
        assert not obtained(make, tmp_path / "train", None).from_cache
        assert not obtain_examples(None, make, tmp_path / "train", cache=tmp_path / "cache").from_cache
        assert make.count == 2 * number


def test_an_example_knows_its_row(made: PreparedRows, tmp_path: Path) -> None:
    origins = obtained(Making(made), tmp_path / "train", None).prepared.origins
    assert list(origins.files) == ["s3://bucket/1.jsonl", "s3://bucket/2.jsonl"]
    places = list(zip(origins.file.tolist(), origins.number.tolist(), strict=True))
    assert places == [(file, number) for file in (0, 1) for number in range(1, 10)]


def test_all_ranks_of_a_node_map_the_same_file(made: PreparedRows, tmp_path: Path) -> None:
    target = tmp_path / "train"
    obtained(Making(made), target, None)

    def rank(_: int) -> tuple[str, list[bool], bool]:
        examples = load_examples(target).examples
        arrays = list(examples._arrays.values())
        mapped = Path("/proc/self/maps").read_text()
        return examples.digest, [array.flags.writeable for array in arrays], str(target / "ids.npy") in mapped

    with ChunkWorkers[int, tuple[str, list[bool], bool]](3, rank) as workers:
        found = [result for _, result in workers.results(range(3), lambda number: number)]
    assert found == [(made.examples.digest, [False] * 4, True)] * 3
    assert isinstance(load_examples(target).examples._arrays["ids"], np.memmap)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def link(path: Path, place: int) -> None:
    other = path.parent.parent / f"other-{path.name}"
    path.rename(other)
    path.symlink_to(other)


def make_folder(path: Path, place: int) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path, place: int) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "changed": flip,
    "cut off": lambda path, place: os.truncate(path, place % path.stat().st_size),
    "longer": lambda path, place: path.write_bytes(path.read_bytes() + bytes(1 + place % 9)),
    "deleted": lambda path, place: path.unlink(),
    "emptied": lambda path, place: path.write_bytes(b""),
    "a link": link,
    "a folder": make_folder,
    "a pipe": make_pipe,
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*FILES, SEAL_FILE]), st.sampled_from(sorted(DAMAGES)), st.integers(0, 10_000))
def test_damaged_examples_are_made_again(
    made: PreparedRows, tmp_path_factory: pytest.TempPathFactory, file: str, damage: str, place: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    make, cache = Making(made), folder / "cache"
    obtained(make, folder / "train", cache)
    DAMAGES[damage](cache / IDENTITY / file, place)
    again = obtained(make, folder / "train", cache)
    assert make.count == 2
    assert not again.from_cache
    assert again.trouble
    assert obtained(make, folder / "train", cache).from_cache
    assert make.count == 2
    shutil.rmtree(folder)


def test_the_sentences_about_damage_say_what_is_damaged(made: PreparedRows, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / IDENTITY

    def trouble(spoil: Callable[[], object], key: bytes = KEY) -> str:
        obtained(Making(made), tmp_path / "train", tmp_path / "cache")
        spoil()
        return obtained(Making(made), tmp_path / "train", tmp_path / "cache", key).trouble

    again = "they are made again"
    changed = f"the examples in {kept} have a changed ids.npy: {again}"
    assert trouble(lambda: flip(kept / "ids.npy", 900)) == changed
    assert trouble((kept / "spans.npy").unlink) == f"the examples in {kept} have no spans.npy: {again}"
    assert trouble((kept / SEAL_FILE).unlink) == f"the examples in {kept} have no seal: {again}"
    assert trouble(lambda: None, b"another key") == f"the examples in {kept} have another seal: {again}"


def test_examples_of_somebody_without_the_key_are_not_believed(made: PreparedRows, tmp_path: Path) -> None:
    make = Making(made)
    obtained(make, tmp_path / "train", tmp_path / "cache", b"a foreign key")
    assert not obtained(make, tmp_path / "train", tmp_path / "cache").from_cache
    assert make.count == 2


def test_examples_under_the_name_of_others_are_not_believed(made: PreparedRows, tmp_path: Path) -> None:
    make, other = Making(made), "b" * 64
    obtained(make, tmp_path / "train", tmp_path / "cache")
    (tmp_path / "cache" / IDENTITY).rename(tmp_path / "cache" / other)
    found = obtained(make, tmp_path / "train", tmp_path / "cache", identity=other)
    assert not found.from_cache
    assert "have the seal of other examples" in found.trouble


def test_several_writers_do_not_harm_each_other(made: PreparedRows, tmp_path: Path) -> None:
    writers = 6
    barrier, make = threading.Barrier(writers), Making(made)

    def at_once() -> PreparedRows:
        barrier.wait(60)
        return make()

    def write(number: int) -> object:
        return values(
            obtain_examples(IDENTITY, at_once, tmp_path / f"{number}" / "train", cache=tmp_path / "cache").prepared
        )

    with ThreadPoolExecutor(writers) as pool:
        found = list(pool.map(write, range(writers)))
    assert found == [values(made)] * writers
    assert make.count == writers
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [IDENTITY]
    assert obtained(make, tmp_path / "again", tmp_path / "cache", b"").from_cache


def test_a_cache_that_can_not_be_written_is_no_error(made: PreparedRows, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, and no folder")
    found = obtain_examples(IDENTITY, Making(made), tmp_path / "train", cache=tmp_path / "cache")
    assert values(found.prepared) == values(made)
    assert found.trouble == f"{tmp_path}/cache/{IDENTITY} can't be written (File exists): the examples are not kept"


def test_a_node_without_room_is_an_outside_failure(made: PreparedRows, tmp_path: Path) -> None:
    (tmp_path / "node").write_text("a file, and no folder")
    with pytest.raises(OutsideFailure, match=r"the examples can't be written to .*: File exists"):
        obtain_examples(IDENTITY, Making(made), tmp_path / "node" / "train")


def test_old_examples_make_room_for_new_ones(
    made: PreparedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, make = tmp_path / "cache", Making(made)
    for number, name in enumerate("bcd"):
        obtained(make, tmp_path / "train", cache, identity=name * 64)
        os.utime(cache / (name * 64), (number, number))
    (cache / "not ours").mkdir()
    asked: Iterator[int] = iter([1, 1, 0, 0, 0, 0])
    monkeypatch.setattr(example_folder, "_missing_bytes", lambda folder, size: next(asked))
    obtained(make, tmp_path / "train", cache)
    assert {entry.name for entry in cache.iterdir()} == {"d" * 64, IDENTITY, "not ours"}
    monkeypatch.setattr(example_folder, "_missing_bytes", lambda folder, size: 1)
    found = obtained(make, tmp_path / "train", cache, identity="e" * 64)
    assert os.strerror(errno.ENOSPC) in found.trouble
    assert [entry.name for entry in cache.iterdir()] == ["not ours"]


def test_what_a_pod_that_died_has_left_is_removed(made: PreparedRows, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("old", "new"):
        (cache / f".unfinished-{name}").mkdir(parents=True)
        (cache / f".unfinished-{name}" / "ids.npy").write_bytes(b"x")
    os.utime(cache / ".unfinished-old", (1, 1))
    obtain_examples(IDENTITY, Making(made), tmp_path / "train", cache=cache)
    assert {entry.name for entry in cache.iterdir()} == {".unfinished-new", IDENTITY}


# ---- the identity ----


@pytest.fixture
def given_identity(tmp_path: Path) -> Callable[..., str | None]:
    """Return a function that returns an identity, with changes of the arguments."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(3, seed=1))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))

    def identity(**changes: Any) -> str | None:
        arguments: dict[str, Any] = {
            "path": path,
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
    assert given_identity(path=copy) == same, "the folder of a file makes no difference"
    (tmp_path / "more").mkdir()
    more = tiny.write_jsonl(tmp_path / "more" / "rows.jsonl", tiny.rows(3, seed=2))
    changes: list[dict[str, Any]] = [
        {"path": more},
        {"path": tiny.write_jsonl(tmp_path / "other-name.jsonl", tiny.rows(3, seed=1))},
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


def test_the_notes_are_json(made: PreparedRows, tmp_path: Path) -> None:
    obtained(Making(made), tmp_path / "train", None)
    assert json.loads((tmp_path / "train" / "notes.json").read_text())["rows"] == 20
