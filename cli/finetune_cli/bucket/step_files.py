"""Writes rows of the step log as CSV, JSON or parquet. `finetune metrics` calls `write_rows`."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from finetune_cli.bucket.step_log import Row, columns_of
from finetune_core.errors import UserError

LARGEST_INTEGER = 2**63 - 1
"""Largest whole number of a parquet column. A column with larger ones becomes one of floating-point numbers."""


class Format(StrEnum):
    """The formats in which the rows can be written."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


def csv_lines(rows: Sequence[Row]) -> list[str]:
    """Return ``rows`` as lines of CSV with a heading. An absent value is an empty cell."""
    lines: list[str] = []

    class Lines:
        def write(self, text: str) -> None:
            lines.append(text)

    names = columns_of(list(rows))
    writer = csv.writer(Lines(), lineterminator="")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return lines


def json_lines(rows: Sequence[Row]) -> list[str]:
    """Return ``rows`` as the lines of a JSON list, one row in each line. Every character that is not ASCII is an escape
    sequence."""
    texts = [json.dumps(row, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f") for row in rows]
    return ["[", *(f"{text}," for text in texts[:-1]), *texts[-1:], "]"]


def write_rows(rows: Sequence[Row], form: Format, target: Path) -> None:
    """Write ``rows`` into the new or existing file ``target``. The file has its name only once it is whole. Raises
    UserError where it can't be written."""

    def write(file: IO[bytes]) -> None:
        if form is Format.PARQUET:
            _write_parquet(rows, file)
            return
        for line in csv_lines(rows) if form is Format.CSV else json_lines(rows):
            file.write(f"{line}\n".encode(errors="replace"))

    try:
        _replace(target, write)
    except OSError as error:
        raise UserError(str(target), f"cannot be written ({error.strerror or error}); name another file") from error


def _replace(target: Path, write: Callable[[IO[bytes]], None]) -> None:
    if target.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(rows: Sequence[Row], file: IO[bytes]) -> None:
    # pyarrow takes a second to import, and the other commands don't need it.
    import pyarrow
    from pyarrow import parquet

    columns = {}
    for name in columns_of(list(rows)):
        values = [row.get(name) for row in rows]
        kind = _kind(values)
        types = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
        converted = [None if value is None else kind(value) for value in values]
        columns[name] = pyarrow.array(converted, type=types[kind])
    parquet.write_table(pyarrow.table(columns), file)


def _kind(values: Sequence[Any]) -> type[bool] | type[int] | type[float] | type[str]:
    """Return the type that all ``values`` of a column fit into."""
    there = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in there):
        return str
    if there and all(isinstance(value, bool) for value in there):
        return bool
    if there and all(isinstance(value, int) and abs(value) <= LARGEST_INTEGER for value in there):
        return int
    try:
        [float(value) for value in there]
    except OverflowError:
        return str
    return float


def _cell(value: object) -> object:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value
