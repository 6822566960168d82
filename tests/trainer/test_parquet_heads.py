"""Of a large parquet file the preflight check reads the schema and the wanted columns of the first row group, or the
schema alone if these columns are too large, and nothing else."""

from __future__ import annotations

import faulthandler
import os
import secrets
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_core.errors import UserError
from finetune_trainer.data.files.index import DataFile, write_index
from finetune_trainer.data.reader import head_columns, read_rows
from finetune_trainer.sources.source_files import HeadLimits, SourceFile, fetch_head_by_ranges

ROWS = [{"text": f"w{number} " + secrets.token_hex(50), "more": secrets.token_hex(5000)} for number in range(40)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=10)
    return path.read_bytes()


def fetched(data: bytes, folder: Path, limits: HeadLimits, name: str = "a.parquet") -> tuple[DataFile | None, int]:
    """Return the local file with the beginning of ``data``, which is written into ``folder``, and how many bytes were
    read. The file is None if its beginning can't be read within ``limits``."""
    read_bytes = 0

    def read(start: int, length: int) -> bytes:
        nonlocal read_bytes
        read_bytes += length
        return data[start : start + length]

    file = fetch_head_by_ranges(SourceFile(name, name, len(data)), DataFile(folder / "0", name), limits, read)
    if file is not None:
        write_index(folder, [file])
    return file, read_bytes


def test_the_first_rows_of_a_large_file_are_read_without_the_other_columns(data: bytes, tmp_path: Path) -> None:
    file, read_bytes = fetched(data, tmp_path, HeadLimits(100, 10_000, {"text"}))
    assert file is not None
    assert (file.is_head, file.has_rows) == (True, True)
    assert read_bytes < 10_000 < len(data)
    rows = list(read_rows(tmp_path, "f", columns={"text"}))
    assert [row.fields for row in rows] == [{"text": row["text"]} for row in ROWS[:10]]
    assert head_columns(tmp_path, "f", most_rows=1, most_bytes=1).names == ["text", "more"]


def test_of_a_row_group_that_is_too_large_the_schema_is_read(data: bytes, tmp_path: Path) -> None:
    file, read_bytes = fetched(data, tmp_path, HeadLimits(100, 10_000, {"more"}))
    assert file is not None
    assert not file.has_rows
    assert read_bytes < 10_000
    assert list(read_rows(tmp_path, "f")) == []
    assert head_columns(tmp_path, "f", most_rows=1, most_bytes=1).total == len(ROWS)


def test_a_schema_that_is_too_large_and_a_large_compressed_file_are_not_read(data: bytes, tmp_path: Path) -> None:
    assert fetched(data, tmp_path, HeadLimits(100, 100, {"text"}))[0] is None
    assert fetched(data, tmp_path, HeadLimits(100, 10_000, {"text"}), "a.parquet.gz")[0] is None


def test_a_small_file_is_read_as_a_whole(data: bytes, tmp_path: Path) -> None:
    file, read_bytes = fetched(data, tmp_path, HeadLimits(100, len(data), {"text"}))
    assert file is not None
    assert (file.is_head, read_bytes) == (False, len(data) + 1)
    assert len(list(read_rows(tmp_path, "f"))) == len(ROWS)


def test_damaged_statistics_of_a_column_do_not_end_the_process(data: bytes, tmp_path: Path) -> None:
    """pyarrow ends its process when it is asked for a column whose histogram of definition levels has a wrong size.

    To make such a file, the test changes each byte of the footer in turn, until pyarrow ends a process that reads it.
    """
    length = int.from_bytes(data[-8:-4], "little")
    for offset in range(len(data) - 8 - length, len(data) - 8):
        damaged = data[:offset] + b"\x01" + data[offset + 1 :]
        if ends_the_process(damaged):
            break
    else:
        pytest.fail("no changed byte makes pyarrow end its process")
    file, _ = fetched(damaged, tmp_path, HeadLimits(100, 10_000, {"text"}))
    assert file is not None
    assert (file.is_head, file.has_rows) == (True, False)
    write_index(tmp_path, [file._replace(is_head=False, has_rows=True)])
    file.path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"^f: a\.parquet can't be read as parquet after row 0: "):
        list(read_rows(tmp_path, "f", columns={"text"}))


def ends_the_process(data: bytes) -> bool:
    """Return whether pyarrow ends a forked process that asks for the columns of the first row group."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            group = parquet.read_metadata(pyarrow.BufferReader(data)).row_group(0)
            [group.column(index) for index in range(group.num_columns)]
        except Exception:  # noqa: BLE001  (an error of any kind is no end of the process)
            os._exit(1)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@given(st.data())
# Each example starts a process that reads the places of the columns, so there are few examples.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_damaged_file_is_rows_or_a_sentence(data: bytes, tmp_path: Path, draw: st.DataObject) -> None:
    tail = len(data) - draw.draw(st.integers(0, 3000))
    noise = draw.draw(st.binary(max_size=20))
    damaged = data[:tail] + noise + data[tail + len(noise) :]
    file, read_bytes = fetched(damaged, tmp_path, HeadLimits(100, 10_000, {"text"}))
    assert read_bytes <= 20_010
    if file is None:
        return
    try:
        rows = list(read_rows(tmp_path, "f", columns={"text"}))
    except UserError:
        rows = []
    assert len(rows) <= len(ROWS)
