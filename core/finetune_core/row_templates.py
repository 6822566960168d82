"""The small template language of `template`, `completion` and `evaluation.basePrompt`: text in which `{name}` stands
for a column of the row.

`{{` and `}}` are braces, as in Python's format strings. `{#name}...{/name}` is a part that is shown only where the
column has a value, and `{^name}...{/name}` is a part that is shown only where the column has none, as in Mustache.
Nothing else has a meaning, and no line break is removed. The operator, the trainer and `finetune validate` parse
templates with this module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

from finetune_core.errors import valid_text

HALF_PAIR = "half of a surrogate pair"
NOT_FINITE = "a number that is not finite"
"""Name, in messages, of a character that a JSON text can contain, but that no tokenizer accepts."""

WELL_FORMED_PATTERN = "^([^{}]|[{][{]|[}][}]|[{][#^/]?[^{}#^/\\n\\r][^{}\\n\\r]*[}])*$"
"""Regular expression of RE2 that a template matches if each of its braces is doubled or encloses a name. A regular
expression can't check whether optional parts are nested well, so only `parse` checks the nesting."""
SHOWS_A_COLUMN_PATTERN = "(^|[^{])([{][{])*[{][^{}#^/]"
"""Regular expression of RE2 that a well-formed template matches if it shows a column."""

_TOKENS = re.compile(r"\{\{|\}\}|\{(?P<mark>[#^/]?)(?P<name>[^{}]*)\}|[{}]")


class TemplateError(ValueError):
    """What is wrong with a template, as a phrase that follows the template's path: `must ...`."""


class RowError(ValueError):
    """What is wrong with a row, as a phrase that follows the row's place: `has no 'input'`."""


class Piece(NamedTuple):
    """A part of a rendered text."""

    text: str
    from_row: bool
    """Whether the text is the value of a column. False for a text of the template itself."""


class _Kind(Enum):
    TEXT = "text"
    COLUMN = "column"
    IF = "#"
    UNLESS = "^"
    END = "/"


class _Token(NamedTuple):
    kind: _Kind
    value: str
    """The text, or the name of the column."""


@dataclass(frozen=True)
class RowTemplate:
    """A parsed template. Aliases in the template are replaced: the tokens name the columns of the row, for example
    `question` where the template has `{prompt}`."""

    tokens: Sequence[_Token]
    names: Mapping[str, str]
    """For each column that the template reads, the name by which the template calls the column. The columns are in the
    order in which the template first names them."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of all columns that the template reads, each once."""
        return list(self.names)

    @property
    def shown(self) -> Set[str]:
        """The names of the columns whose values are shown in the text, perhaps in an optional part."""
        return {token.value for token in self.tokens if token.kind is _Kind.COLUMN}

    @property
    def only_column(self) -> str | None:
        """The name of the column if the template consists of one column and nothing else. Else None."""
        return self.tokens[0].value if [token.kind for token in self.tokens] == [_Kind.COLUMN] else None

    @property
    def ending(self) -> str:
        """The text at the end of the template, behind the last column or optional part. Empty if the template ends with
        a column or with an optional part."""
        last = self.tokens[-1] if self.tokens else None
        return last.value if last is not None and last.kind is _Kind.TEXT else ""

    def pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        """Return, in pieces, the text that the template makes of ``row``. Empty pieces are left out. Raises RowError
        where the row lacks a column that must be shown, or where `text_of` can't show the value of such a column."""
        found: list[Piece] = []
        open_parts: list[bool] = []
        """For each optional part that encloses the current token, whether the part is shown for this row."""
        for token in self.tokens:
            if token.kind is _Kind.END:
                open_parts.pop()
            elif token.kind in (_Kind.IF, _Kind.UNLESS):
                open_parts.append(is_empty(row.get(token.value)) is (token.kind is _Kind.UNLESS))
            elif all(open_parts):
                is_column = token.kind is _Kind.COLUMN
                text = text_of(token.value, row.get(token.value)) if is_column else token.value
                if text:
                    found.append(Piece(text, is_column))
        return found


def parse(text: str, aliases: Mapping[str, str] | None = None) -> RowTemplate:
    """Return the template that ``text`` holds. ``aliases`` maps names in the template to the columns that they stand
    for, for example `prompt` to `question`.

    Raises TemplateError for a brace that is not doubled and encloses no name, for optional parts that are not closed,
    or not in the reverse order of their beginnings, and for a template that shows no column.
    """
    tokens: list[_Token] = []
    names: dict[str, str] = {}
    opened: list[str] = []
    literal: list[str] = []

    def end_literal() -> None:
        tokens.append(_Token(_Kind.TEXT, "".join(literal)))
        literal.clear()

    position = 0
    for match in _TOKENS.finditer(text):
        literal.append(text[position : match.start()])
        position = match.end()
        if match[0] in ("{{", "}}"):
            literal.append(match[0][0])
            continue
        name, mark = match["name"], match["mark"]
        place = f"character {match.start() + 1}"
        if name is None:
            raise TemplateError(
                f"must hold each brace of the text twice (`{{{{` or `}}}}`): the `{match[0]}` at {place} has no"
                " counterpart"
            )
        if not name or name[0] in "#^/" or "\n" in name or "\r" in name:
            raise TemplateError(
                f"must name a column in each pair of braces, and hold a brace of the text twice (`{{{{` or `}}}}`): at"
                f" {place} stands {match[0][:40]!r}"
            )
        end_literal()
        if mark == _Kind.END.value:
            if not opened or opened[-1] != name:
                inner = f"`{{/{opened[-1]}}}`" if opened else "nothing"
                raise TemplateError(
                    f"must close its optional parts in the reverse order of their beginnings: `{{/{name}}}` stands at"
                    f" {place}, where {inner} can be closed"
                )
            opened.pop()
        elif mark:
            opened.append(name)
        column = (aliases or {}).get(name, name)
        names.setdefault(column, name)
        tokens.append(_Token(_Kind(mark) if mark else _Kind.COLUMN, column))
    if opened:
        raise TemplateError(f"must close each optional part: there is no `{{/{opened[-1]}}}`")
    literal.append(text[position:])
    end_literal()
    if not any(token.kind is _Kind.COLUMN for token in tokens):
        raise TemplateError(f"must hold a column of the row, such as `{{{next(iter(aliases or {}), 'prompt')}}}`")
    return RowTemplate([token for token in tokens if token.value], names)


def is_empty(value: Any) -> bool:
    """Return whether ``value``, the value of a column, counts as no value: it is missing, null or false, a text of
    nothing but white space, an empty list or an empty object. 0 counts as a value."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value is False or (isinstance(value, Sequence | Mapping) and not value)


def text_of(column: str, value: Any) -> str:
    """Return ``value``, the value of the column ``column`` in a row, as text. A text stays as it is. Numbers, true and
    false are written as in JSON. Of the types in parquet files, decimals are written without an exponent, and dates and
    times as in ISO 8601.

    Raises RowError for None, which stands for a missing or null column, for a text with half of a surrogate pair, for a
    number that can't be written, such as infinity, and for any other value, such as a list.
    """
    if value is None:
        raise RowError(f"has no {column!r}")
    if isinstance(value, str):
        if valid_text(value) != value:
            raise RowError(f"has a {column!r} that is not text ({HALF_PAIR})")
        return value
    if isinstance(value, bool | int):
        try:
            return json.dumps(value)
        except ValueError:  # Python writes no whole number of more than 4,300 digits
            raise RowError(f"has a {column!r} that is not text (a number of too many digits)") from None
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    raise RowError(f"has a {column!r} that is not text ({_kind_of(value)})")


def text_or_none(value: Any) -> str | None:
    """Return the text that a template shows for ``value``, a value of a row, as `text_of` returns it. Return None where
    a template can't show the value."""
    try:
        return text_of("", value)
    except RowError:
        return None


def _kind_of(value: Any) -> str:
    if isinstance(value, float | Decimal):
        return NOT_FINITE
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"
