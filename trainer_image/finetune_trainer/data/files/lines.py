"""Reads files in which each line is a row: JSON lines, and plain text, whose rows have the one column `text`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import TextIO

from finetune_trainer.data.files.json_values import RowDecoder, has_too_many_values, not_utf8
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.files.streams import ROW_BYTES, ROW_CHARACTERS, FileProblem, bad_byte, most_characters

TEXT_COLUMN = "text"
"""Name of the column that the rows of a .txt file have."""
PIECE_CHARACTERS = 16 * 1024 * 1024
"""How many characters of a long line are read at once."""
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_lines(file: TextIO) -> Iterator[Row]:
    """Yield a row for each line that is not blank. The columns of a row are the members of its JSON object."""
    decoder = RowDecoder()
    # `enumerate`, or a variable of this function, would keep a long line in memory while the next line is read.
    for row in map(partial(_json_line, decoder), itertools.count(1), bounded_lines(file)):
        if row is not None:
            yield row


def text_lines(file: TextIO) -> Iterator[Row]:
    """Yield a row for each line that is not blank, with the line as its only column and without its line break."""
    for number, line in enumerate(bounded_lines(file), start=1):
        text = line.rstrip("\r\n")
        if text.strip():
            wrong = bad_byte(text)
            yield Row(number, {TEXT_COLUMN: text}) if wrong is None else Row(number, {}, not_utf8(wrong))


def _json_line(decoder: RowDecoder, number: int, line: str) -> Row | None:
    if not line.strip():
        return None
    if has_too_many_values(line, 0):
        return Row(number, {}, f"has more values than fit into {ROW_BYTES >> 20} MiB of memory")
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
    """Return the index of the first character from ``start`` on that JSON does not count as white space."""
    found = _BLANKS.match(line, start)
    return found.end() if found is not None else start


def bounded_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file with their line breaks. Raises FileProblem for a line that is too long, because such a
    line may have gigabytes."""
    pieces: list[str] = []
    number, characters, most = 1, 0, ROW_CHARACTERS
    size = min(PIECE_CHARACTERS, ROW_CHARACTERS + 1)
    while piece := file.readline(size):
        if pieces and pieces[-1].endswith("\r") and piece != "\n":
            # The single CR at the end of the last piece has ended the line.
            yield _joined(pieces)
            number, characters, most = number + 1, 0, ROW_CHARACTERS
        is_whole = len(piece) < size or piece.endswith("\n")
        if pieces or not is_whole:
            pieces.append(piece)
            characters += len(piece)
            most = min(most, most_characters(piece, ROW_CHARACTERS))
            if characters > most:
                raise FileProblem(f"has more than {most} characters in line {number}")
        if is_whole:
            yield _joined(pieces) if pieces else piece
            number, characters, most = number + 1, 0, ROW_CHARACTERS
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[str]) -> str:
    """Return the text of ``pieces``, and empty the list, because otherwise the text would be in memory twice."""
    text = "".join(pieces)
    pieces.clear()
    return text
