"""Data and models whose reading would take gigabytes of memory are findings of the preflight check. The pod of the
check stays within its memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_core.contract.preflight_result import FindingKind
from finetune_trainer.pod.settings import Paths
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.preflights import on_a_volume, paths_in, run_program

FINAL = FindingKind.FINAL
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""With these variables a program gets its memory in pages of 2 MiB. The kernel needs seconds for gigabytes in pages of
4 KiB. What the program writes is the same."""


@pytest.fixture
def paths(tmp_path: Path, store: ObjectStore) -> Paths:
    return paths_in(tmp_path, store)


def in_another_process(program: str, path: Path) -> None:
    """Run ``program`` in a process of its own, with ``path`` as its argument. The memory that the program takes is free
    again before the test measures any memory."""
    subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, **LARGE_PAGES}, check=True)


REPEATED = """
import sys, pyarrow, pyarrow.parquet
table = pyarrow.table({"question": ["a" * (1 << 20)] * 600, "reply": ["w1"] * 600})
pyarrow.parquet.write_table(table, sys.argv[1], compression="zstd")
"""
ONE_VALUE = """
import sys, pyarrow, pyarrow.parquet
table = pyarrow.table({"question": ["a" * (800 << 20)], "reply": ["w1"]})
pyarrow.parquet.write_table(table, sys.argv[1], compression="zstd", use_dictionary=False, write_statistics=False)
"""
MANY_ITEMS = """
import sys, numpy, pyarrow, pyarrow.parquet
items = pyarrow.ListArray.from_arrays([0, 150_000_000], pyarrow.array(numpy.zeros(150_000_000, "int8")))
table = pyarrow.table({"question": items, "reply": ["w2"]})
pyarrow.parquet.write_table(table, sys.argv[1], compression="zstd")
"""
UNREAD_ITEMS = MANY_ITEMS.replace("table({", 'table({"other": items, ').replace(
    '"question": items', '"question": ["w1"]'
)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (REPEATED, "bytes, and its first 8 rows alone hold 8388728: a file that expands to"),
        (ONE_VALUE, "dataset.train: can't be checked with 512 MiB of memory"),
        pytest.param(MANY_ITEMS, "dataset.train: can't be checked with 512 MiB of memory", marks=pytest.mark.long),
    ],
    ids=["many rows", "one value", "many items"],
)
def test_a_small_file_that_expands_to_gigabytes_is_a_finding(
    program: str, sentence: str, paths: Paths, store: ObjectStore
) -> None:
    path, source = on_a_volume(paths, "train.parquet")
    in_another_process(program, path)
    assert path.stat().st_size < 1_000_000
    paths.run_file.write_text(json.dumps(run_config(store, "bomb", **source)))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings[0].kind) == (64, FINAL), ended.log
    assert sentence in ended.result.findings[0].message
    # The pod may use 1 GiB. The child that reads the file may use 512 MiB of its own, and at most 192 MiB
    # more until its parent looks at its memory again.
    assert ended.memory_mebibytes < 1000


def test_a_column_that_expands_to_gigabytes_is_no_finding_where_nobody_reads_it(
    paths: Paths, store: ObjectStore
) -> None:
    path, source = on_a_volume(paths, "train.parquet")
    in_another_process(UNREAD_ITEMS, path)
    paths.run_file.write_text(json.dumps(run_config(store, "unread", **source)))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings) == (0, []), ended.log
    assert ended.data_memory_mebibytes < 400


def test_a_line_without_an_end_is_a_finding(paths: Paths, store: ObjectStore) -> None:
    path, source = on_a_volume(paths, "train.jsonl")
    with path.open("wb") as file:
        file.truncate(4 << 30)  # a sparse file, which takes no space on the disk
    paths.run_file.write_text(json.dumps(run_config(store, "line", **source)))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings[0].kind) == (64, FINAL), ended.log
    sentence = "dataset.train: train.jsonl has more than 67108864 characters in line 1"
    assert ended.result.findings[0].message == sentence
    assert ended.memory_mebibytes < 1000


def _a_header_of_gigabytes(file: Path) -> int:
    """Write a sparse file, which takes no space on the disk. Return the length of its header in bytes."""
    length = 3 << 30
    file.write_bytes(length.to_bytes(8, "little") + b"{")
    os.truncate(file, 8 + length)
    return length


def _a_header_of_a_million_tensors(file: Path) -> int:
    """Write a header that is whole JSON and fits the length of the file. Return the header's length in bytes."""
    header = b"{" + b",".join(b'"%d":{"data_offsets":[0,0]}' % number for number in range(1_000_000)) + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    return len(header)


@pytest.mark.parametrize("write_weights", [_a_header_of_gigabytes, _a_header_of_a_million_tensors])
def test_a_header_of_gigabytes_and_one_of_a_million_tensors_are_refused(
    write_weights: Callable[[Path], int], paths: Paths, store: ObjectStore
) -> None:
    folder = paths.volumes / "models"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    length = write_weights(folder / "model.safetensors")
    model = {"volume": {"claimName": "models", "path": "."}}
    paths.run_file.write_text(json.dumps(run_config(store, "header", model=model)))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings[0].kind) == (64, FINAL), ended.log
    assert f"model.safetensors has a header of {length} bytes, more than" in ended.result.findings[0].message
    assert ended.memory_mebibytes < 500


def test_a_chat_template_that_makes_a_huge_text_is_a_finding(
    tmp_path: Path, tiny_model: Path, paths: Paths, store: ObjectStore
) -> None:
    folder = paths.volumes / "models"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text("{{ 'a' * 4000000000 }}")
    path, source = on_a_volume(paths, "train.jsonl")
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    form = {"messages": {"messagesField": "messages"}}
    model = {"volume": {"claimName": "models", "path": "."}}
    changes = {**source, "model": model, "dataset__format": form, "dataset__validation": None}
    paths.run_file.write_text(json.dumps(run_config(store, "template", **changes)))
    ended = run_program(paths)
    assert (ended.code, ended.result.findings[0].kind) == (64, FINAL), ended.log
    assert "the chat template takes more than 256 MiB of memory for one row" in ended.result.findings[0].message
    assert ended.memory_mebibytes < 1000
