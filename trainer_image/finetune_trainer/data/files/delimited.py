"""Reads csv and tsv files. The first line names the columns, and all values are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from finetune_trainer.data.files.json_values import not_utf8
from finetune_trainer.data.files.lines import bounded_lines
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.files.streams import ROW_CHARACTERS, FileProblem, bad_byte


def csv_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows of a file whose fields are separated by commas (RFC 4180)."""
    return _rows(file, ",")


def tsv_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows of a file whose fields are separated by tabs. Quotes have the same meaning as in csv."""
    return _rows(file, "\t")


def _rows(file: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(ROW_CHARACTERS)
    reader = csv.reader(bounded_lines(file), strict=True, delimiter=delimiter)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise FileProblem(f"has a header that can't be read: {error}") from None
    if header is None:
        return
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise FileProblem(f"can't be read as csv: its header has {twice!r} twice")
    if bad_byte("".join(header)) is not None:
        raise FileProblem("has a header that is not UTF-8 text")
    while True:
        # A quoted field may contain line breaks, so the row begins on the line after the last line that was read.
        start = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            # The reader goes on with the next line. So an opened quote costs the rows up to the next quote.
            end = reader.line_num
            through = f", up to line {end}" if end > start else ""
            yield Row(start, {}, f"is not csv ({error}{through})")
            continue
        if values is None:
            return
        if not values:
            continue
        if len(values) != len(header):
            yield Row(start, {}, f"has {len(values)} fields where the header has {len(header)}")
            continue
        wrong = bad_byte(delimiter.join(values))
        fields = dict(zip(header, values, strict=True))
        yield Row(start, fields) if wrong is None else Row(start, {}, not_utf8(wrong))
