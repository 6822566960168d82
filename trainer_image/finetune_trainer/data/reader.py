"""Reads jsonl, csv and parquet files row by row. Each row knows its place in the file, so that a user can find a bad
row in an editor.

A row that can't be parsed is returned with a problem and without columns. The caller decides what happens to bad rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from finetune_core.errors import UserError, valid_text
from finetune_trainer.pod.errors import first_line

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")
CSV_FIELD_LIMIT = 64 * 1024 * 1024
"""Largest csv field in characters. Python's default of 131,072 characters is shorter than some prompts."""
PARQUET_BATCH_ROWS = 64
"""How many rows of a parquet file are decoded at once. Larger batches are not faster, and rows may be large."""
EXPANDED_BYTES = 256 * 1024 * 1024
LARGEST_EXPANSION = 10_000
"""A parquet file is refused once its decoded rows hold more than EXPANDED_BYTES, and more than this many times the
bytes of the file. Rows that all have the same long prompt stay far below this limit."""


@dataclass(frozen=True)
class Row:
    """One row of a data file: its place in the file, and either its columns or what is wrong with it."""

    number: int
    """Line on which the row begins, counted from 1. In a parquet file, number of the row, counted from 1."""
    fields: Mapping[str, Any]
    problem: str | None = None
    unit: Literal["line", "row"] = "line"
    file: str = ""
    """Path of the file that holds the row, relative to the folder that was read. Empty if a single file was read."""

    def place(self, source: str) -> str:
        """Return the place of the row for messages: `data/train.jsonl line 12`, if ``source`` is `data/train.jsonl`."""
        return valid_text(f"{source}{'/' if self.file else ''}{self.file} {self.unit} {self.number}")


def read_rows(path: Path, field: str, *, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of the file ``path``. If ``path`` is a folder, yield the rows of all data files in it, ordered by
    file name. ``field`` names the file's field in the spec in error messages: `dataset.train`.

    Of a parquet file that has any of ``columns``, only these columns are decoded. Rows of other files have all columns.

    Raises UserError if a file can't be read in the format that its suffix names, or if ``path`` is a file with another
    suffix than DATA_SUFFIXES.
    """
    if not path.is_dir():
        yield from _read_file(path, field, columns)
        return
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in DATA_SUFFIXES):
        for row in _read_file(file, field, columns):
            yield replace(row, file=str(file.relative_to(path)))


def first_rows(rows: Iterable[Row], *, most_rows: int, most_bytes: int) -> Iterator[Row]:
    """Yield the first of ``rows``: at most ``most_rows`` of them, and none after the row with which the content of the
    yielded rows reaches ``most_bytes``."""
    left = most_bytes
    for row in islice(rows, most_rows):
        yield row
        left -= content_bytes(row.fields)
        if left <= 0:
            return


def content_bytes(value: object) -> int:
    """Return about how many bytes the texts and numbers in ``value`` hold, including those in lists and mappings."""
    total = 0
    # A list instead of recursion, because JSON may be nested more deeply than Python functions may call each other.
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, Mapping):
            total += sum(len(str(key)) for key in value)
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        else:
            total += 8
    return total


def _read_file(path: Path, field: str, columns: Collection[str] | None) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, field, columns)
        return
    readers: Mapping[str, Callable[[TextIO], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv}
    if suffix not in readers:
        raise UserError(
            field, f"must be a {', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]} file, not {path.name!r}"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from readers[suffix](file)
    except UnicodeDecodeError as error:
        raise UserError(field, f"{path.name} is not UTF-8 text (byte {error.start} of a block)") from None
    except csv.Error as error:
        raise UserError(field, f"{path.name} can't be read as csv: {error}") from None


def _jsonl(file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"is not JSON ({error})")
            continue
        if isinstance(fields, dict):
            yield Row(number, fields)
        else:
            yield Row(number, {}, "is not a JSON object")


def _csv(file: TextIO) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.reader(file, strict=True)
    header = next(reader, None)
    if header is None:
        return
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise csv.Error(f"its header has {twice!r} twice")
    while True:
        # A quoted field may contain line breaks, so the row begins on the line after the last line that was read.
        start = reader.line_num + 1
        values = next(reader, None)
        if values is None:
            return
        if not values:
            continue
        if len(values) == len(header):
            yield Row(start, dict(zip(header, values, strict=True)))
        else:
            yield Row(start, {}, f"has {len(values)} fields where the header has {len(header)}")


def _parquet(path: Path, field: str, columns: Collection[str] | None) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = content = 0
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            found = [name for name in file.schema_arrow.names if columns is None or name in columns]
            decoded = file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=found or None, use_threads=False)
            for batch in decoded:
                content += batch.nbytes
                if content > max(EXPANDED_BYTES, LARGEST_EXPANSION * size):
                    problem = f"has {size} bytes and expands to more than {content}: it is not read further"
                    raise UserError(field, f"{path.name} {problem}")
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields, unit="row")
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(field, f"{path.name} can't be read as parquet after row {number}: {reason}") from None
