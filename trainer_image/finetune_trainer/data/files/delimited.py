"""Reads csv and tsv files. The first line that is not blank names the columns, and all values are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from finetune_trainer.data.files.json_values import not_utf8
from finetune_trainer.data.files.lines import bounded_lines
from finetune_trainer.data.files.row import Row, repeated
from finetune_trainer.data.files.streams import ROW_BYTES, ROW_CHARACTERS, FileProblem, bad_byte

_FIELD_BYTES = 64
"""How many bytes of memory Python takes for a short field."""


def csv_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows of a file whose fields are separated by commas (RFC 4180)."""
    return _rows(file, ",")


def tsv_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows of a file whose fields are separated by tabs. Quotes have the same meaning as in csv."""
    return _rows(file, "\t")


def _rows(file: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(ROW_CHARACTERS)
    lines = _RecordLines(file, delimiter)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    try:
        # Some programs begin a file with blank lines. They are skipped here, as blank lines between rows are.
        header = next(filter(None, reader), None)
    except csv.Error as error:
        raise FileProblem(f"has a header that can't be read: {error}") from None
    if header is None:
        return
    twice = repeated(header)
    if twice is not None:
        raise FileProblem(f"can't be read as csv: its header has {twice!r} twice")
    if bad_byte("".join(header)) is not None:
        raise FileProblem("has a header that is not UTF-8 text")
    while True:
        # A quoted field may contain line breaks, so the row begins on the line after the last line that was read.
        start = reader.line_num + 1
        lines.begin_record()
        try:
            values = next(reader, None)
        except csv.Error as error:
            # After an error the reader goes on with the next line. So a quote that is never closed makes only the rows
            # up to the next quote unreadable.
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


class _RecordLines:
    """The lines of a file for a csv reader, with a limit on the characters and on the fields of a record.

    A line break within quotes does not end a record. So a single opened quote could make the rest of a file one record,
    and the csv reader would hold all its lines in memory until the record ends.
    """

    def __init__(self, file: TextIO, delimiter: str) -> None:
        self._lines, self._delimiter = bounded_lines(file), delimiter
        self.begin_record()

    def begin_record(self) -> None:
        """Count the characters and the fields from here on as those of a new record."""
        self._characters = self._fields = 0
        self._most = ROW_CHARACTERS
        self._is_long = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next line. Raises csv.Error if the record has too many fields, if a single line has too many
        characters, or if all lines of the record together have too many. The last of these errors is raised one line
        late, so that the csv reader itself can first report a field that is too long."""
        if self._is_long:
            raise csv.Error(f"row larger than row limit ({self._most})")
        self._is_long = self._characters > self._most
        line = next(self._lines)
        self._characters += len(line)
        if not line.isascii():
            # The csv reader takes four bytes for each character of a field. The text itself takes one byte for each
            # character if it is ASCII, and may take up to four if it is not.
            self._most = ROW_CHARACTERS // 2
        if len(line) > self._most:
            raise csv.Error(f"row larger than row limit ({self._most})")
        self._fields += line.count(self._delimiter)
        if self._fields * _FIELD_BYTES > ROW_BYTES:
            raise csv.Error(f"more fields than fit into {ROW_BYTES >> 20} MiB of memory")
        return line
