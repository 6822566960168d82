"""Reads files in which each line is a row: JSON lines, and plain text, whose rows have the one column `text`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from finetune_trainer.data.files.json_values import RowDecoder, not_utf8
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.files.streams import ROW_CHARACTERS, FileProblem, bad_byte

TEXT_COLUMN = "text"
"""Name of the column that the rows of a .txt file have."""
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_lines(file: TextIO) -> Iterator[Row]:
    """Yield a row for each line that is not blank. The columns of a row are the members of its JSON object."""
    decoder = RowDecoder()
    for number, line in enumerate(bounded_lines(file), start=1):
        if line.strip():
            yield _json_line(decoder, number, line)


def text_lines(file: TextIO) -> Iterator[Row]:
    """Yield a row for each line that is not blank, with the line as its only column and without its line break."""
    for number, line in enumerate(bounded_lines(file), start=1):
        text = line.rstrip("\r\n")
        if text.strip():
            wrong = bad_byte(text)
            yield Row(number, {TEXT_COLUMN: text}) if wrong is None else Row(number, {}, not_utf8(wrong))


def _json_line(decoder: RowDecoder, number: int, line: str) -> Row:
    try:
        found = decoder.decode(line, _after_blanks(line, 0))
        if _after_blanks(line, found.end) < len(line):
            raise json.JSONDecodeError("Extra data", line, found.end)
    except json.JSONDecodeError as error:
        wrong = bad_byte(line)
        if wrong is not None:
            return Row(number, {}, not_utf8(wrong))
        return Row(number, {}, f"is not JSON ({error.msg} at character {error.pos + 1})")
    except RecursionError:
        return Row(number, {}, "is not JSON that can be read (it is nested too deeply)")
    return Row(number, found.fields, found.problem)


def _after_blanks(line: str, start: int) -> int:
    """Return the place of the first character from ``start`` on that is none of JSON's blanks."""
    found = _BLANKS.match(line, start)
    return found.end() if found is not None else start


def bounded_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file with their line breaks. Raises FileProblem for a line that is too long, because such a
    line may have gigabytes."""
    number = 0
    while line := file.readline(ROW_CHARACTERS + 1):
        number += 1
        if len(line) > ROW_CHARACTERS:
            raise FileProblem(f"has more than {ROW_CHARACTERS} characters in line {number}")
        yield line
