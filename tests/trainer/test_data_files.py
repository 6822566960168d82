"""Data files of every kind become rows. A fault in one row makes a bad row. After a fault that hides where the next row
begins, the whole file is refused. Whatever a file contains, the reader returns rows or raises an error with a sentence
for the user."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_core.errors import UserError
from finetune_trainer.data.files.index import DataFile, read_index, write_index
from finetune_trainer.data.files.json_files import json_rows
from finetune_trainer.data.files.kinds import Compression, Kind, kind_of
from finetune_trainer.data.files.row import Row, repeated
from finetune_trainer.data.files.streams import FileProblem
from finetune_trainer.data.reader import head_columns, read_rows
from finetune_trainer.pod.errors import OutsideFailure

MIB = 1 << 20


def zstandard(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard}
ROWS = [{"text": "w1 \u2028 ä", "more": "1"}, {"text": "w2", "more": "2"}]
CONTENTS = {
    ".jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": "text,more\r\nw1 \u2028 ä,1\r\nw2,2\r\n".encode(),
    ".tsv": "text\tmore\nw1 \u2028 ä\t1\nw2\t2".encode(),
    ".txt": "w1 \u2028 ä\n\nw2".encode(),
}


def read(folder: Path, name: str, data: bytes, columns: set[str] | None = None) -> list[Row]:
    path = folder / name
    path.write_bytes(data)
    return list(read_rows(path, "dataset.train", columns=columns))


def problems(rows: list[Row]) -> dict[int, str]:
    return {row.number: row.problem for row in rows if row.problem is not None}


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_read_in_every_compression_and_only_the_named_columns(
    kind: Kind, compression: Compression, tmp_path: Path
) -> None:
    if kind is Kind.PARQUET:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "plain")
        data = (tmp_path / "plain").read_bytes()
    else:
        data = CONTENTS[kind]
    rows = read(tmp_path, f"Train{kind.upper()}{compression}", COMPRESS[compression](data))
    assert [row.fields["text"] for row in rows] == [row["text"] for row in ROWS]
    only = read(tmp_path, f"train{kind}{compression}", COMPRESS[compression](data), {"text"})
    assert [dict(row.fields) for row in only] == [{"text": row["text"]} for row in ROWS]
    found = head_columns(tmp_path / f"train{kind}{compression}", "dataset.train", most_rows=9, most_bytes=999)
    assert (found.names, found.total, found.parsed) == (
        (["text"], 2, 2) if kind is Kind.TEXT else (["text", "more"], 2, 2)
    )


def test_the_kind_of_a_file_follows_from_its_suffixes() -> None:
    assert kind_of("a/Rows.JSONL.GZ") == (Kind.JSON_LINES, Compression.GZIP, "a/Rows.JSONL")
    assert kind_of("rows.json") == (Kind.JSON, Compression.NONE, "rows.json")
    assert [kind_of(name) for name in ("jsonl", "rows.gz", "rows.xlsx", "")] == [None] * 4


def test_a_byte_that_is_no_utf8_costs_its_row_in_every_text_file(tmp_path: Path) -> None:
    assert problems(read(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}')) == {
        2: "is not UTF-8 text (byte 8 of the row)"
    }
    assert problems(read(tmp_path, "a.json", b'[{"a": 1},\n{"a": "\xe9"}, {"a": 2}]')) == {
        2: "is not UTF-8 text (byte 8 of the row)"
    }
    assert problems(read(tmp_path, "a.csv", b"a,b\n1,2\n3,\xe9\n5,6")) == {3: "is not UTF-8 text (byte 3 of the row)"}
    assert problems(read(tmp_path, "a.txt", b"one\n\xe9\ntwo")) == {2: "is not UTF-8 text (byte 1 of the row)"}
    with pytest.raises(UserError, match=r"^dataset.train: a.txt is UTF-16 text: it must be saved as UTF-8$"):
        read(tmp_path, "a.txt", "one".encode("utf-16"))


def test_the_sign_of_a_long_number_is_no_digit(tmp_path: Path) -> None:
    lines = b'{"a": -' + b"1" * 4300 + b'}\n{"a": -' + b"1" * 4301 + b"}\n{}"
    assert problems(read(tmp_path, "a.jsonl", lines)) == {2: "has a number of more than 4300 digits"}


def test_a_key_that_stands_twice_in_an_object_costs_its_row(tmp_path: Path) -> None:
    lines = b'{"a": 1, "a": 2}\n{"b": [{"c": 1, "c": 1}]}\n{"a": 1, "b": {"a": 2}}'
    twice = {1: "has the key 'a' twice in one object", 2: "has the key 'c' twice in one object"}
    assert problems(read(tmp_path, "a.jsonl", lines)) == twice
    assert problems(read(tmp_path, "a.json", lines)) == twice


def test_equal_names_of_columns_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    for function in (
        lambda path: list(read_rows(path, "f")),
        lambda path: head_columns(path, "f", most_rows=1, most_bytes=1),
    ):
        with pytest.raises(UserError, match=r"^f: a.parquet has the column 'text' twice$"):
            function(tmp_path / "a.parquet")


def test_broken_quotes_cost_the_rows_up_to_the_next_quote(tmp_path: Path) -> None:
    found = read(tmp_path, "a.csv", b'a,b\n1,"x"y\n2,3\n4,"open\n5,"\n6,7\n8,"to the end\n9,10\n')
    assert problems(found) == {
        2: "is not csv (',' expected after '\"')",
        7: "is not csv (unexpected end of data, up to line 8)",
    }
    assert [dict(row.fields) for row in found if row.problem is None] == [
        {"a": "2", "b": "3"},
        {"a": "4", "b": "open\n5,"},
        {"a": "6", "b": "7"},
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not JSON: Expecting value in row 1"),
        ('[{"a": 1}', "is not JSON: behind row 1 a comma or the end of the array is missing"),
        ('[{"a": 1} {"a": 2}]', "is not JSON: behind row 1 a comma or the end of the array is missing"),
        ('[{"a": 1},]', "is not JSON: Expecting value in row 2"),
        ('[{"a": 1}, {"b": }]', "is not JSON: Expecting value in row 2"),
        ('[{"a": "open}]', "is not JSON: Unterminated string in row 1"),
        ('[{"a": 1}] more', "is not JSON: text follows the end of the array"),
        ("rows", "must hold an array of objects, or objects one behind the other"),
        ("[" * 100_000, "can't be read at row 1: it is nested too deeply"),
    ],
)
def test_a_json_file_that_is_no_json_is_refused_at_its_row(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, "a.json", text.encode())
    assert str(caught.value) == f"dataset.train: a.json {sentence}"


def test_a_json_file_may_hold_objects_one_behind_the_other_and_none_at_all(tmp_path: Path) -> None:
    assert [row.fields for row in read(tmp_path, "a.json", b'\xef\xbb\xbf{"a": 1}\n{"a": 2} {"a":3}')] == [
        {"a": 1},
        {"a": 2},
        {"a": 3},
    ]
    assert [read(tmp_path, "a.json", data) for data in (b"", b" \n", b"[]", b" [ ] ")] == [[]] * 4


def test_an_item_of_an_array_that_is_no_object_costs_its_row(tmp_path: Path) -> None:
    found = read(tmp_path, "a.json", b'[1, {"a": 1}, "x", null, 23]')
    assert problems(found) == dict.fromkeys((1, 3, 4, 5), "is not a JSON object")


@given(st.lists(st.dictionaries(st.text(max_size=3), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
), max_size=3), max_size=8), st.integers(0, 4))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_value_reads_the_same_in_both_kinds_of_json(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    expected = [repr(json.loads(line)) for line in lines.splitlines()]
    for name, data in (("a.jsonl", lines), ("a.json", json.dumps(rows, indent=indent or None).encode())):
        assert [repr(dict(row.fields)) for row in read(tmp_path, name, data)] == expected


def test_a_column_that_is_nested_too_deeply_costs_its_row_only_if_it_is_read(tmp_path: Path) -> None:
    deep = b'{"text": "w1", "other": ' + b'[{"a":' * 60 + b"1" + b"}]" * 60 + b"}\n"
    assert problems(read(tmp_path, "a.jsonl", deep)) == {1: "has a 'other' that is nested deeper than 100 levels"}
    assert [row.fields for row in read(tmp_path, "a.jsonl", deep, {"text"})] == [{"text": "w1"}]
    endless = b'{"text": ' + b"[" * 100_000
    assert problems(read(tmp_path, "a.jsonl", endless)) == {1: "is not JSON that can be read (it is nested too deeply)"}


def test_rows_that_cross_the_blocks_of_a_json_file_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.json_files.CHUNK_CHARACTERS", 1)
    rows = [{"a": 'x"\\\u00e9' * 30, "n": 1234567, "b": [-1.5e-3, None, True]}] * 3
    for data in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        assert [row.fields for row in read(tmp_path, "a.json", data.encode())] == rows


DAMAGED = [*(name + end for name in CONTENTS for end in COMPRESS), ".parquet", ".parquet.gz"]


@given(st.sampled_from(DAMAGED), st.binary(max_size=200), st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_file_of_any_kind_are_rows_or_a_sentence(
    tmp_path: Path, suffix: str, noise: bytes, data: st.DataObject
) -> None:
    kind, compression = suffix.removesuffix(".gz").removesuffix(".zst"), Path(suffix).suffix
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "plain")
        honest = (tmp_path / "plain").read_bytes()
    else:
        honest = CONTENTS[kind]
    honest = COMPRESS[compression if compression in COMPRESS else ""](honest)
    at = data.draw(st.integers(0, len(honest)))
    # Random bytes alone seldom pass the first check of a format, so they are also put into a valid file.
    for content in (noise, honest[:at] + noise + honest[at + len(noise) :], honest[:at]):
        sentence, rows = "", []
        try:
            rows = read(tmp_path, f"a{suffix}", content)
            head_columns(tmp_path / f"a{suffix}", "dataset.train", most_rows=5, most_bytes=100)
        except UserError as error:
            sentence = str(error)
        assert sentence == "" or re.fullmatch(rf"dataset.train: a{suffix} [^\n]+", sentence)
        assert all(row.problem is None or not row.fields for row in rows)


ODD_VALUES: dict[str, Any] = {
    "nanoseconds": pyarrow.array([1], pyarrow.timestamp("ns")),
    "far time": pyarrow.array([2**62], pyarrow.timestamp("us")),
    "far time with a zone": pyarrow.array([2**60], pyarrow.timestamp("ms", "Europe/Berlin")),
    "unknown zone": pyarrow.array([1], pyarrow.timestamp("s", "Nowhere/Land")),
    "far day": pyarrow.array([2**60 - 2**60 % 86_400_000], pyarrow.int64()).cast(pyarrow.date64()),
    "duration": pyarrow.array([1], pyarrow.duration("ns")),
    "long duration": pyarrow.array([2**62], pyarrow.duration("s")),
    "time of day": pyarrow.array([1], pyarrow.time64("ns")),
    "decimal": pyarrow.array([decimal.Decimal("1.5")], pyarrow.decimal256(50, 2)),
    "no utf-8": pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string()),
    "nested no utf-8": pyarrow.array([[b"\xff"]], pyarrow.list_(pyarrow.binary())).view(
        pyarrow.list_(pyarrow.string())
    ),
    "equal names in a struct": pyarrow.StructArray.from_arrays(
        [pyarrow.array([1]), pyarrow.array([2])], names=["x", "x"]
    ),
    "map": pyarrow.array([[("k", 1), ("k", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "dictionary": pyarrow.array(["x"]).dictionary_encode(),
    "null": pyarrow.nulls(1),
    "half float": pyarrow.array([1.5], pyarrow.float16()),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_a_value_of_any_parquet_type_is_read_or_costs_its_row(name: str, tmp_path: Path) -> None:
    odd = ODD_VALUES[name]
    both = pyarrow.concat_arrays([odd, pyarrow.nulls(1, odd.type)])
    table = pyarrow.table({"text": pyarrow.array(["w1", "w2"]), "odd": both})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet", "dataset.train")
    assert second.problem is None or name == "equal names in a struct"
    assert first.problem is None or first.problem.startswith("has a 'odd' that can't be read (")
    unused = read_rows(tmp_path / "a.parquet", "dataset.train", columns={"text"})
    assert [dict(row.fields) for row in unused] == [{"text": "w1"}, {"text": "w2"}]
    assert head_columns(tmp_path / "a.parquet", "f", most_rows=1, most_bytes=1).names == ["text", "odd"]


PARQUET_TYPES = st.sampled_from(
    [
        *(pyarrow.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Nowhere/Land")),
        *(pyarrow.duration(unit) for unit in ("s", "ms", "us", "ns")),
        pyarrow.time64("us"),
        pyarrow.time64("ns"),
        pyarrow.date64(),
        pyarrow.int64(),
        pyarrow.uint64(),
        pyarrow.float64(),
    ]
)


@given(PARQUET_TYPES, st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bits_of_any_type_are_read_or_cost_their_row(
    tmp_path: Path, kind: Any, bits: list[int | None], nested: bool
) -> None:
    values = pyarrow.array(bits, pyarrow.int64()).view(kind)
    if nested:
        values = pyarrow.StructArray.from_arrays([values], names=["inner"])
    # pyarrow can't write some values, such as days with a fraction. That is no fault of the reader.
    try:
        parquet.write_table(pyarrow.table({"odd": values}), tmp_path / "a.parquet")
    except pyarrow.ArrowException:
        return
    rows = list(read_rows(tmp_path / "a.parquet", "dataset.train"))
    assert len(rows) == len(bits)
    assert all(row.problem is None or not row.fields for row in rows)


def test_lack_of_memory_is_no_fault_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("finetune_trainer.data.files.lines._json_line", no_memory)
    with pytest.raises(MemoryError):
        list(read_rows(tmp_path / "a.jsonl", "dataset.train"))


def test_a_file_that_may_not_be_read_is_an_outside_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutsideFailure, match=r"^dataset.train: a.jsonl can't be read: No such file or directory$"):
        list(read_rows(tmp_path / "a.jsonl", "dataset.train"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.setattr("finetune_trainer.data.files.lines._json_line", refuse)
    sentence = rf"^dataset.train: a.jsonl can't be read by the pod's user {os.getuid()}: Permission denied$"
    with pytest.raises(OutsideFailure, match=sentence):
        list(read_rows(tmp_path / "a.jsonl", "dataset.train"))


def test_the_files_of_an_index_are_read_in_its_order_and_rows_name_their_file(tmp_path: Path) -> None:
    files = [DataFile(tmp_path / str(number), f"part-{number}.txt", f"s3://b/part-{number}.txt") for number in (2, 1)]
    for file in files:
        file.path.write_text(f"{file.name}\n")
    write_index(tmp_path, files)
    assert read_index(tmp_path) == files
    rows = list(read_rows(tmp_path, "dataset.train"))
    assert [row.place("s3://b/*") for row in rows] == ["s3://b/part-2.txt line 1", "s3://b/part-1.txt line 1"]
    assert [row.fields["text"] for row in rows] == ["part-2.txt", "part-1.txt"]


@pytest.mark.parametrize("suffix", [f"{kind}{end}" for kind in CONTENTS for end in COMPRESS])
def test_of_the_beginning_of_a_file_the_complete_rows_are_read(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.json_files.CHUNK_CHARACTERS", 1)
    kind, compression = suffix.removesuffix(".gz").removesuffix(".zst"), Path(suffix).suffix
    content = CONTENTS[kind]
    whole = {
        ".jsonl": content + b'\n{"text": "w3"}',
        ".json": content,
        ".csv": content + b'1,"2\n',
        ".tsv": content + b"\n1\t2",
        ".txt": content + b"\nmore",
    }[kind]
    data = COMPRESS[compression if compression in COMPRESS else ""](whole)
    path = tmp_path / "file"
    path.write_bytes(data[:-1] if compression in ("", kind) else data[:-9])
    write_index(tmp_path, [DataFile(path, f"a{suffix}", is_head=True)])
    rows = list(read_rows(tmp_path, "dataset.train"))
    assert all(row.problem is None for row in rows)
    assert [row.fields["text"] for row in rows] == [row["text"] for row in ROWS][: len(rows)]
    if compression in ("", kind):
        assert len(rows) == (1 if kind == ".json" else 2)


def test_a_row_without_an_end_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "json_files", "delimited"):
        monkeypatch.setattr(f"finetune_trainer.data.files.{module}.ROW_CHARACTERS", 100)
    long = b'{"text": "' + b"x" * 1000 + b'"}'
    for name in ("a.jsonl", "a.txt", "a.csv", "a.tsv"):
        with pytest.raises(UserError, match=rf"{name} has more than 100 characters in line 2$"):
            read(tmp_path, name, b'{"a": 1}\n' + long + b'\n{"a": 2}\n')
    monkeypatch.setattr("finetune_trainer.data.files.json_files.CHUNK_CHARACTERS", 10)
    with pytest.raises(UserError, match=r"a.json has a row 1 of more than 100 characters$"):
        read(tmp_path, "a.json", b"[" + long + b"]")
    assert problems(read(tmp_path, "a.csv", b"a\n" + b'"' + b"x\n" * 100 + b'"\nb'))[2].startswith(
        "is not csv (field larger than field limit (100)"
    )


def test_of_a_row_without_an_end_no_more_is_read_than_a_row_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.json_files.ROW_CHARACTERS", 100)
    monkeypatch.setattr("finetune_trainer.data.files.json_files.CHUNK_CHARACTERS", 8)
    file = io.StringIO('  [ {"a": 1}, {"a": "' + "x" * 1000)
    with pytest.raises(FileProblem, match="has a row 2 of more than 100 characters"):
        list(json_rows(file))
    assert file.tell() <= len('  [ {"a": 1}, ') + 101


def test_a_csv_row_of_endless_lines_costs_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.delimited.ROW_CHARACTERS", 100)
    # In each line with two quotes, the first quote closes the field that the line before has opened, and the second one
    # opens a new field. So the row goes on, and no field is long.
    found = read(tmp_path, "a.csv", b'a\n1\n"\n' + b'","\n' * 40 + b'"\n2\n')
    assert next(dict(row.fields) for row in found if row.problem is None) == {"a": "1"}
    assert problems(found)[3] == "is not csv (row larger than row limit (100), up to line 29)"
    assert max(problems(found)) > 29


def test_blank_lines_before_the_header_of_a_csv_file_are_skipped(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "a.csv", b"\n\r\na,b\n1,2\n")
    assert (row.number, row.fields) == (4, {"a": "1", "b": "2"})
    assert read(tmp_path, "a.csv", b"\n\n") == []


@pytest.mark.parametrize("names", [[*map(str, range(200_000)), "199999"], ["7", *map(str, range(200_000))]])
def test_a_million_names_are_searched_once_for_equal_ones(names: list[str], tmp_path: Path) -> None:
    """Comparing each name with all others would take many minutes."""
    twice = names[-1] if names[0] == "0" else "7"
    assert repeated(names) == twice
    row = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    assert problems(read(tmp_path, "a.jsonl", row.encode())) == {1: f"has the key '{twice}' twice in one object"}
    with pytest.raises(UserError, match=f"^dataset.train: a.csv can't be read as csv: its header has '{twice}' twice$"):
        read(tmp_path, "a.csv", ",".join(names).encode())


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_expands_without_measure_is_not_read_to_its_end(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.streams.EXPANDED_BYTES", MIB)
    monkeypatch.setattr("finetune_trainer.data.files.streams.LARGEST_EXPANSION", 100)
    bomb = COMPRESS[compression](b"row\n" * (4 * MIB))
    with pytest.raises(UserError, match=rf"a.txt{compression} has \d+ bytes and expands to more than \d+: it is not"):
        read(tmp_path, f"a.txt{compression}", bomb)


def zstandard_frame(window_log: int, data: bytes) -> bytes:
    """Return a frame of Zstandard (RFC 8878) with a window of 2 ** ``window_log`` bytes and one block of ``data``."""
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3])
    return header + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_a_compressed_file_may_have_several_parts_and_a_window_of_128_mebibytes(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"
    parts = {
        "a.txt.gz": gzip.compress(b"one\n") + gzip.compress(b"") + gzip.compress(b"two\n") + bytes(100),
        "a.txt.zst": skipped + zstandard(b"one\n") + skipped + zstandard_frame(27, b"two\n") + skipped,
    }
    for name, data in parts.items():
        assert [row.fields["text"] for row in read(tmp_path, name, data)] == ["one", "two"]
    with pytest.raises(UserError, match=r"a.txt.zst can't be read as zst after row 0: .*requires too much memory"):
        read(tmp_path, "a.txt.zst", zstandard_frame(28, b"one\n"))


PEAK = 'int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10'
"""A Python expression for the largest resident memory of the process in MiB. `getrusage` is not used, because it may
return the memory of the process that started this one."""
MEASURED = """
import json, sys
from pathlib import Path
from finetune_trainer.data.files.streams import FileProblem
from finetune_trainer.data.reader import head_columns, read_rows
path = Path(sys.argv[1])
head_columns(path, "dataset.train", most_rows=100, most_bytes=8 << 20)
rows = sum(len(row.fields["text"]) > 0 for row in read_rows(path, "dataset.train", columns={"text"}))
print(json.dumps({"rows": rows, "peak": PEAK}))
"""


def peak_mebibytes(path: Path, rows: int) -> int:
    """Return the peak of the resident memory of a process that looks at the columns of ``path`` and reads its rows.
    Assert that the number of rows is ``rows``."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.replace("PEAK", PEAK), str(path)], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["rows"] == rows
    return int(told["peak"])


def test_a_large_column_that_nobody_reads_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    schema = pyarrow.schema([("text", pyarrow.string()), ("unused", pyarrow.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for number in range(0, 1000, 100):
            rows = [{"text": f"w{number}", "unused": chr(97 + number % 7) * 1_400_000}] * 100
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    assert peak_mebibytes(path, 1000) <= 200


def test_a_row_group_of_hundreds_of_megabytes_is_read_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{row}" + "x" * 2000 for row in range(100_000)]})
    parquet.write_table(table, path, row_group_size=100_000, compression=None, use_dictionary=False)
    del table
    assert peak_mebibytes(path, 100_000) <= 200


def test_long_texts_that_lie_side_by_side_take_the_memory_of_a_few(tmp_path: Path) -> None:
    """The size of a file does not tell how much is decoded: a file may hold a text once for all its rows, and a few
    rows may be far longer than the average."""
    long = "abcdefgh" * 175_000
    parquet.write_table(pyarrow.table({"text": [long] * 200}), tmp_path / "once.parquet")
    assert peak_mebibytes(tmp_path / "once.parquet", 200) <= 200
    table = pyarrow.table({"text": ["short"] * 20_000 + [f"{number}{long}" for number in range(64)]})
    parquet.write_table(table, tmp_path / "end.parquet", use_dictionary=False, write_batch_size=1)
    assert peak_mebibytes(tmp_path / "end.parquet", 20_064) <= 200


MEASURED_SENTENCE = """
import json, sys
from pathlib import Path
from finetune_core.errors import UserError
from finetune_trainer.data.reader import read_rows
found = []
try:
    for row in read_rows(Path(sys.argv[1]), "dataset.train", columns={"text"}):
        found.append(row.problem or "read")
except UserError as error:
    found.append(str(error))
print(json.dumps({"found": found, "peak": PEAK}))
"""
CHARACTERS = 64 * MIB
"""Largest number of characters of a row. The limit is half of this number for a row with a character beyond U+FFFF, and
in a csv or tsv file for every row that is not ASCII."""


@pytest.mark.parametrize(
    ("name", "begin", "unit", "count", "end", "found"),
    [
        ("a.jsonl", '{"text": "', "\U0001f600", CHARACTERS, "", "a.jsonl has more than 33554432 characters in line 1"),
        ("a.jsonl", '{"text": "', "\U0001f600", CHARACTERS // 2 - 20, '"}', "read"),
        ("a.jsonl", '{"text": "\U0001f600', "x", CHARACTERS // 2, '"}', "more than 33554432 characters in line 1"),
        ("a.jsonl", '{"text": "', "\u0416", CHARACTERS - 20, '"}', "read"),
        ("a.jsonl", '{"text": [', "[],", CHARACTERS // 4, "0]}", "has more values than fit into 256 MiB of memory"),
        ("a.json", '[{"text": "', "\U0001f600", CHARACTERS, "", "a.json has a row 1 of more than 33554432 characters"),
        ("a.json", '[{"text": [', "[],", CHARACTERS // 4, "0]}]", "a row 1 with more values than fit into 256 MiB"),
        ("a.txt", "", "\U0001f600", CHARACTERS, "", "a.txt has more than 33554432 characters in line 1"),
        ("a.csv", "text\n", "\U0001f600", CHARACTERS // 2 - 20, "", "read"),
        ("a.csv", "text\n", "\u0416", CHARACTERS - 20, "", "is not csv (row larger than row limit (33554432)"),
        ("a.csv", "text\n", "ab,", CHARACTERS // 4, "", "is not csv (more fields than fit into 256 MiB of memory"),
    ],
)
def test_the_longest_rows_of_any_characters_and_values_take_bounded_memory(
    name: str, begin: str, unit: str, count: int, end: str, found: str, tmp_path: Path
) -> None:
    """A character takes up to four bytes of memory, and short values take many times as much as their text."""
    path = tmp_path / name
    with path.open("w", encoding="utf-8") as file:
        file.write(begin)
        for _ in range(count // MIB):
            file.write(unit * MIB)
        file.write(unit * (count % MIB) + end)
    command = [sys.executable, "-c", MEASURED_SENTENCE.replace("PEAK", PEAK), str(path)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    path.unlink()
    assert found in told["found"][0]
    assert told["peak"] <= 500


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_lines_that_are_read_in_pieces_are_whole_and_have_their_numbers(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.lines.PIECE_CHARACTERS", size)
    text = "a\nbc\r\n\ndef\rg\r\rhij\r\n\r\nklmno\np"
    rows = read(tmp_path, "a.txt", text.encode())
    # `splitlines` of bytes ends lines as Python's files do.
    lines = [line.decode() for line in text.encode().splitlines()]
    assert [(row.number, row.fields["text"]) for row in rows] == [
        (number, line) for number, line in enumerate(lines, 1) if line
    ]


def test_a_small_parquet_file_with_endless_rows_of_nothing_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.streams.EXPANDED_BYTES", MIB)
    monkeypatch.setattr("finetune_trainer.data.files.streams.LARGEST_EXPANSION", 10)
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(100_000, pyarrow.bool_())}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet has \d+ bytes and expands to more than \d+: it is not read further"
    ):
        list(read_rows(tmp_path / "a.parquet", "dataset.train"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.zst", "a.jsonl.gz"])
def test_the_memory_for_a_file_of_twenty_gigabytes_is_that_of_a_small_one(name: str, tmp_path: Path) -> None:
    """The file is a named pipe, because a test machine may not have twenty gigabytes of free space."""
    program = """
import gzip, itertools, json, os, sys
import pyarrow
name, path, total = sys.argv[1], sys.argv[2], 20_000_000_000
row = json.dumps({"text": "word " * 2000})
words = "word " * 2000 + "\\n"
line = {".json": row + ",\\n", ".csv": words, ".txt": words}.get(name[1:], row + "\\n")
block = (line * 100).encode()
start = {".json": b"[", ".csv": b"text\\n"}.get(name[1:], b"")
end = row.encode() + b"]" if name.endswith(".json") else b""
stream = open(path, "wb", buffering=0)
if name.endswith(".gz"):
    block = gzip.compress(block)
elif name.endswith(".zst"):
    block = pyarrow.compress(block, codec="zstd", asbytes=True)
stream.write(start)
for _ in range(total // (len(line) * 100)):
    stream.write(block)
stream.write(end)
print(total // (len(line) * 100) * 100 + bool(end))
"""
    reading = """
import sys
from pathlib import Path
import finetune_trainer.data.files.streams as streams
from finetune_trainer.data.reader import read_rows
# The size of a pipe is 0, so that nothing can be said about its expansion.
streams.EXPANDED_BYTES = 1 << 50
rows = sum(1 for _ in read_rows(Path(sys.argv[1]), "dataset.train", columns={"text"}))
print(rows, PEAK)
"""
    path = tmp_path / name
    os.mkfifo(path)
    writer = subprocess.Popen([sys.executable, "-c", program, name, str(path)], stdout=subprocess.PIPE, text=True)
    done = subprocess.run(
        [sys.executable, "-c", reading.replace("PEAK", PEAK), str(path)], capture_output=True, text=True, check=True
    )
    told, _ = writer.communicate()
    rows, peak = map(int, done.stdout.split())
    print(f"{name}: {rows} rows, {peak} MiB at most")
    assert rows == int(told)
    assert peak <= 500


def test_times_that_python_can_hold_are_values(tmp_path: Path) -> None:
    table = pyarrow.table({"when": pyarrow.array([datetime.datetime(2026, 1, 2, 3, 4, 5)], pyarrow.timestamp("ns"))})
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet", "dataset.train")
    assert str(row.fields["when"]).startswith("2026-01-02 03:04:05")
