"""Reads jsonl and csv row by row and keeps the physical line number, so that a bad row can be found in an editor.

A row that can't be parsed comes out with its problem instead of its fields: who reads decides what a bad row means.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from finetune_core.errors import UserError

FIELD_LIMIT = 64 * 1024 * 1024
"""Largest csv field; Python's default of 128 KiB is shorter than a long prompt."""


@dataclass(frozen=True)
class Row:
    """One row: where its text begins (line 1 is the first), and its fields or what is wrong with it."""

    line: int
    fields: Mapping[str, Any]
    problem: str | None = None


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Return the rows of the file at ``path``; ``name`` (a field path) goes into errors.

    Raises UserError for another kind of file than jsonl and csv, and for bytes that are not UTF-8.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(name, f"must be a .jsonl or .csv file, and {path.name!r} is neither")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from reader(file)
    except UnicodeDecodeError as error:
        raise UserError(name, f"{path.name} is not UTF-8 text (byte {error.start} of a block)") from None
    except csv.Error as error:
        raise UserError(name, f"{path.name} can't be read as csv: {error}") from None


def _jsonl(file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            yield Row(number, {}, f"is not JSON ({error})")
            continue
        if isinstance(fields, dict):
            yield Row(number, fields)
        else:
            yield Row(number, {}, "is not a JSON object")


def _csv(file: TextIO) -> Iterator[Row]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(file, strict=True)
    header = next(reader, None)
    if header is None:
        return
    while True:
        # A quoted field may span lines: the row begins on the line after the last one that was read.
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
