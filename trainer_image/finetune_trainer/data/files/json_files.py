"""Reads .json files: an array of objects, each of which is a row, or objects one behind the other, as in JSON lines.

Only the text around the current row is in memory, and not the whole file. The text of a row is decoded by Python's own
decoder, so that a row means the same in a .json file and in a .jsonl file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from finetune_trainer.data.files.json_values import Decoded, RowDecoder, has_too_many_values
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.files.streams import ROW_BYTES, ROW_CHARACTERS, FileProblem, most_characters

CHUNK_CHARACTERS = 64 * 1024
PIECE_CHARACTERS = 8 * 1024 * 1024
"""How many characters of the file are read at once, at least and at most. For a row that is nearly as long as a row may
be, fewer are read."""
_BLANKS = re.compile(r"[ \t\r\n]*")
_NEAR_THE_END = 16
"""An error that the decoder reports within this many characters before the end of the text in memory may come only from
a value whose rest has not been read yet. The longest token, apart from strings and numbers, is `-Infinity`, and an
escape in a string has at most 12 characters."""


def json_rows(file: TextIO) -> Iterator[Row]:
    """Yield the rows of a .json file. Raises FileProblem if the file is no JSON, or if a row is too large or nested too
    deeply, because then nobody can tell where the next row begins."""
    text = _Text(file)
    first = text.next_character()
    if first == "":
        return
    is_array = first == "["
    if is_array:
        text.position += 1
    elif first != "{":
        raise FileProblem("must hold an array of objects, or objects one behind the other")
    number = 0
    while True:
        character = text.next_character()
        if character == "" and not is_array:
            return
        if character == "]" and is_array and number == 0:
            break
        text.row = number = number + 1
        found = _decode(text, number)
        text.position = found.end
        yield Row(number, found.fields, found.problem, unit="row")
        if is_array:
            character = text.next_character()
            if character == "]":
                break
            if character != ",":
                raise FileProblem(f"is not JSON: behind row {number} a comma or the end of the array is missing")
            text.position += 1
    text.position += 1
    if text.next_character() != "":
        raise FileProblem("is not JSON: text follows the end of the array")


class _Text:
    """The part of a file's text that is in memory, and the position in it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.buffer = ""
        self.position = 0
        self.is_at_end = False
        """Whether it is known that no text follows `buffer`."""
        self.row = 0
        """Number of the row at the position, for messages."""

    def extend(self) -> None:
        """Read more text, and drop the text before the position. About as many characters are read as are still in
        memory, so that the time for a long row is proportional to its length. The text in memory gets at most one
        character longer than a row may be.

        Raises FileProblem if the text from the position on is longer than a row may be.
        """
        self.buffer, self.position = self.buffer[self.position :], 0
        held = len(self.buffer)
        wanted = min(max(CHUNK_CHARACTERS, held), PIECE_CHARACTERS, ROW_CHARACTERS + 1 - held)
        more = self._file.read(max(1, wanted))
        self.is_at_end = not more
        most = min(most_characters(self.buffer, ROW_CHARACTERS), most_characters(more, ROW_CHARACTERS))
        if held > most:
            raise FileProblem(f"has a row {self.row} of more than {most} characters")
        self.buffer += more

    def next_character(self) -> str:
        """Move to the next character that is no blank and return it, or an empty text at the end of the file."""
        while True:
            found = _BLANKS.match(self.buffer, self.position)
            self.position = found.end() if found is not None else self.position
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if self.is_at_end:
                return ""
            self.extend()


def _decode(text: _Text, number: int) -> Decoded:
    """Decode the row at the position of ``text``, and read on until the row is complete."""
    decoder = RowDecoder()
    while True:
        try:
            found = decoder.decode(text.buffer, text.position)
        except RecursionError:
            raise FileProblem(f"can't be read at row {number}: it is nested too deeply") from None
        except json.JSONDecodeError as error:
            is_incomplete = error.msg.startswith("Unterminated string") or (
                error.pos >= len(text.buffer) - _NEAR_THE_END
            )
            if text.is_at_end or not is_incomplete:
                raise FileProblem(f"is not JSON: {error.msg.removesuffix(' starting at')} in row {number}") from None
        else:
            # A number at the end of the text in memory may have further digits that have not been read yet.
            if found.end < len(text.buffer) or text.is_at_end:
                return found
        if len(text.buffer) - text.position > ROW_CHARACTERS:
            raise FileProblem(f"has a row {number} of more than {ROW_CHARACTERS} characters")
        if has_too_many_values(text.buffer, text.position):
            raise FileProblem(f"has a row {number} with more values than fit into {ROW_BYTES >> 20} MiB of memory")
        text.extend()
