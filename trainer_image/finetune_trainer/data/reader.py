"""Reads data files of all kinds row by row. Each row has its place in the file, so that a user can find a bad row in an
editor.

A row that can't be parsed is returned with a problem and without columns. The caller decides what happens to bad rows.
Whatever a library raises about a file as a whole, except MemoryError, becomes a UserError here, or OutsideFailure if
the file system refuses to read the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

from finetune_core.errors import UserError
from finetune_trainer.data.files.delimited import csv_rows, tsv_rows
from finetune_trainer.data.files.index import DataFile, read_index
from finetune_trainer.data.files.json_files import json_rows
from finetune_trainer.data.files.kinds import KINDS_TEXT, FileKind, Kind, kind_of
from finetune_trainer.data.files.lines import json_lines, text_lines
from finetune_trainer.data.files.parquet_rows import parquet_rows, parquet_schema
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.files.streams import FileProblem, HeadEnded, open_seekable, open_text
from finetune_trainer.pod.errors import OutsideFailure, first_line

DEEPEST = 100
"""Largest number of levels of lists and mappings that a value of a column that is read may have. The values in parquet
files are not checked."""
_TEXT_READERS: Mapping[Kind, Callable[[TextIO], Iterator[Row]]] = {
    Kind.JSON_LINES: json_lines,
    Kind.JSON: json_rows,
    Kind.CSV: csv_rows,
    Kind.TSV: tsv_rows,
    Kind.TEXT: text_lines,
}


def data_files(path: Path) -> list[DataFile]:
    """Return the data files of a source: ``path`` itself if it is a file, or the files that the index in the folder
    ``path`` names."""
    return read_index(path) if path.is_dir() else [DataFile(path, path.name)]


def read_rows(path: Path, field: str, *, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a data source: of the file ``path``, or of the files that the index in the folder ``path``
    names, one after the other. ``field`` is the path of the source in the spec for messages, for example
    `dataset.train`.

    A row has those columns of its file that are in ``columns``, or all columns if ``columns`` is None. If a parquet
    file has none of ``columns``, its rows have all its columns. If only the beginning of a file is there, its complete
    rows are yielded.

    Raises UserError if a file can't be read as what its suffix says or has no suffix of a data file, and OutsideFailure
    if the file system refuses to read it.
    """
    for file in data_files(path):
        with closing(_read_file(file, field, columns)) as rows:
            yield from (replace(row, file=file.place) for row in rows) if file.place else rows


class HeadColumns(NamedTuple):
    """The columns of the first rows of a data source."""

    names: list[str]
    """The names of all columns that at least one of these rows has."""
    total: int
    """Number of rows that were looked at. Of a parquet file all rows count, because its schema holds for all of
    them."""
    parsed: int
    """How many of these rows could be parsed."""


def head_columns(path: Path, field: str, *, most_rows: int, most_bytes: int) -> HeadColumns:
    """Return the columns of the first rows of a data source. In each file, about ``most_bytes`` bytes of rows are
    looked at, until ``most_rows`` rows of the source were looked at. Of a parquet file only the schema is read, and all
    its rows count as looked at. Raises the same errors as `read_rows`."""
    names: dict[str, None] = {}
    total = parsed = 0
    for file in data_files(path):
        found = kind_of(file.name)
        if found is not None and found.kind is Kind.PARQUET:
            with _boundary(file, field, lambda: "the schema"), open_seekable(file.path, found.compression) as opened:
                schema, rows = parquet_schema(opened)
            names |= dict.fromkeys(schema)
            total += rows
            parsed += rows
        else:
            left = most_rows - total
            for row in first_rows(_read_file(file, field, None), most_rows=left, most_bytes=most_bytes):
                names |= dict.fromkeys(row.fields)
                total += 1
                parsed += row.problem is None
        if total >= most_rows:
            break
    return HeadColumns(list(names), total, parsed)


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


def is_deep(value: object) -> bool:
    """Return whether lists and mappings in ``value`` are nested deeper than DEEPEST levels. Recursive code, such as
    that of the JSON encoder, fails for a value that is nested much deeper."""
    left = [(value, 0)] if isinstance(value, Mapping | list) else []
    while left:
        value, depth = left.pop()
        if depth >= DEEPEST:
            return True
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        left.extend((item, depth + 1) for item in inner if isinstance(item, Mapping | list))
    return False


def _read_file(file: DataFile, field: str, columns: Collection[str] | None) -> Generator[Row, None, None]:
    found = kind_of(file.name)
    if found is None:
        raise UserError(field, f"must be a file with the suffix {KINDS_TEXT}, not {file.name!r}")
    last: Row | None = None

    def where() -> str:
        return f"{last.unit} {last.number}" if last is not None else "row 0"

    with _boundary(file, field, where):
        for row in _rows(file, found, columns):
            last = row
            yield row


@contextmanager
def _boundary(file: DataFile, field: str, where: Callable[[], str]) -> Iterator[None]:
    """Turn whatever is raised in the `with` block about ``file`` into UserError or OutsideFailure. MemoryError is
    raised as it is, and HeadEnded only ends the block.

    ``where`` returns the place behind which the file can't be read, for example `line 12`.
    """
    try:
        yield
    except HeadEnded:
        return
    except FileProblem as error:
        raise UserError(field, f"{file.name} {error}") from None
    except (MemoryError, UserError, OutsideFailure):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            who = f" by the pod's user {os.getuid()}" if isinstance(error, PermissionError) else ""
            raise OutsideFailure(f"{field}: {file.name} can't be read{who}: {error.strerror}") from error
        # The decoders of parquet files and compressed files may raise any exception for a damaged file.
        kind = file.name.rpartition(".")[2].lower()
        reason = first_line(error)
        raise UserError(field, f"{file.name} can't be read as {kind} after {where()}: {reason}") from error


def _rows(file: DataFile, found: FileKind, columns: Collection[str] | None) -> Iterator[Row]:
    if found.kind is Kind.PARQUET:
        size = file.path.stat().st_size
        with open_seekable(file.path, found.compression) as opened:
            yield from parquet_rows(opened, size, columns, is_head=file.is_head) if file.has_rows else ()
        return
    with open_text(file.path, found.compression, is_head=file.is_head) as text:
        for row in _TEXT_READERS[found.kind](text):
            read = {name: value for name, value in row.fields.items() if columns is None or name in columns}
            deep = next((name for name, value in read.items() if is_deep(value)), None)
            if row.problem is not None:
                yield row
            elif deep is not None:
                yield replace(row, fields={}, problem=f"has a {deep!r} that is nested deeper than {DEEPEST} levels")
            else:
                yield replace(row, fields=read)
