"""Decodes a row that is a JSON value in a text. Unlike with `json.loads`, a key that occurs twice in an object is a
problem of the row, because nobody can know which of the two values is meant.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from finetune_trainer.data.files.row import repeated
from finetune_trainer.data.files.streams import ROW_BYTES, bad_byte

_BYTES_OF_VALUES = {",": 64, "[": 64, "{": 192, ":": 128}
"""How many bytes of memory Python takes for what begins at each of these characters in JSON: a further value (`,`), a
list (`[`), an object (`{`), or the value of a key together with the key (`:`)."""
_LONGEST_INTEGER = 4300
"""Largest number of digits of an integer, as in Python itself. The time to read an integer grows with the square of its
length."""


class Decoded(NamedTuple):
    """A decoded row."""

    fields: dict[str, Any]
    """The columns of the row. Empty if there is a problem."""
    end: int
    """Index in the text of the first character behind the value."""
    problem: str | None
    """What is wrong with the row, as a phrase that follows its place. None if the row can be used."""


class RowDecoder:
    """Decodes rows that are JSON objects."""

    def __init__(self) -> None:
        """Make a decoder."""
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def decode(self, text: str, start: int) -> Decoded:
        """Return the row that begins at ``start`` in ``text``. There must be no blank at ``start``. A value that is no
        object is a row with a problem.

        Raises JSONDecodeError if no JSON value begins there or if ``text`` ends within the value, and RecursionError if
        the value is nested too deeply.
        """
        self._problem = None
        value, end = self._decoder.raw_decode(text, start)
        if not isinstance(value, dict):
            return Decoded({}, end, "is not a JSON object")
        wrong = bad_byte(text, start, end)
        if wrong is not None:
            return Decoded({}, end, not_utf8(wrong))
        return Decoded({}, end, self._problem) if self._problem else Decoded(value, end, None)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        twice = repeated(name for name, _ in pairs) if len(found) < len(pairs) else None
        if twice is not None:
            self._problem = f"has the key {twice[:100]!r} twice in one object"
        return found

    def _integer(self, digits: str) -> int:
        if len(digits.removeprefix("-")) > _LONGEST_INTEGER:
            self._problem = f"has a number of more than {_LONGEST_INTEGER} digits"
            return 0
        return int(digits)


def has_too_many_values(text: str, start: int) -> bool:
    """Return whether the JSON from ``start`` on in ``text`` has so many values that they may take more than ROW_BYTES
    bytes of memory. Characters in strings are counted too, because only few of them are among `_BYTES_OF_VALUES`."""
    if (len(text) - start) * max(_BYTES_OF_VALUES.values()) <= ROW_BYTES:
        return False
    return sum(size * text.count(sign, start) for sign, size in _BYTES_OF_VALUES.items()) > ROW_BYTES


def not_utf8(byte: int) -> str:
    """Return the phrase for a row that is no UTF-8 text from byte ``byte`` on, counted from 1 in the row."""
    return f"is not UTF-8 text (byte {byte} of the row)"
