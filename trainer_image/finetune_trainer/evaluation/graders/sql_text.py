"""Reads SQL text for the SQL grader: tokens, statements, and which generated rows a reference query needs.

The module does not parse SQL completely, because sqlite runs the queries. If this module overlooks something in a
query, the generated rows may fail to show that a wrong query is wrong. A right query is never graded as wrong for this
reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import NamedTuple


class Kind(Enum):
    """Kind of an SQL token."""

    WORD = "word"
    """A keyword or a name. In the query, a name may be in quotes."""
    STRING = "string"
    NUMBER = "number"
    SYMBOL = "symbol"


class Token(NamedTuple):
    """An SQL token. Its ``text`` has no quotes. Keywords and names are in lower case."""

    kind: Kind
    text: str
    depth: int
    """Number of parentheses that are open where the token stands."""


Value = int | float | str

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | '(?P<string> (?:[^']|'')* )'
    | "(?P<double> (?:[^"]|"")* )"
    | `(?P<back> (?:[^`]|``)* )` | \[(?P<square> [^\]]* )\]
    | (?P<number> (?: [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ ) (?:[eE][-+]?[0-9]+)? )
    | (?P<word> \w+ )
    | (?P<symbol> <> | [<>!=]= | \|\| | \S )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMPARISONS = {"=": "=", "==": "=", "is": "=", "like": "like", "!=": "!=", "<>": "!="} | {
    sign: sign for sign in ("<", ">", "<=", ">=")
}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_AGGREGATES = frozenset({"avg", "sum", "total", "min", "max"})


def tokens(text: str, columns: Collection[str] = ()) -> list[Token]:
    """Split SQL into tokens. A text in double quotes is a name if it is one of ``columns``, and else a string.

    sqlite reads double quotes in the same way (sqlite.org/quirks.html, double-quoted string literals).
    """
    found: list[Token] = []
    depth = 0
    for match in _TOKEN.finditer(text):
        group = match.lastgroup
        part = match[group] if group else ""
        if group == "symbol":
            depth -= part == ")"
            found.append(Token(Kind.SYMBOL, part, depth))
            depth += part == "("
        elif group == "number":
            found.append(Token(Kind.NUMBER, part, depth))
        elif group == "string" or (group == "double" and part.lower() not in columns):
            found.append(Token(Kind.STRING, part.replace("''", "'") if group == "string" else part, depth))
        elif group and group != "comment":
            found.append(Token(Kind.WORD, part.lower(), depth))
    return found


def statements(text: str) -> list[str]:
    """Split SQL into statements at the semicolons outside of quotes. Return the statements without these semicolons."""
    parts = [""]
    for match in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|;|[^;'\"`]+|.", text, re.DOTALL):
        if match[0] == ";":
            parts.append("")
        else:
            parts[-1] += match[0]
    return [part.strip() for part in parts if part.strip()]


def expansions(text: str) -> int:
    """Return an upper bound for the number of copies that sqlite makes of a query's common table expressions.

    sqlite copies such an expression wherever it is used. If each expression uses the one before it twice, the number of
    copies doubles with each expression. sqlite makes the copies while it prepares the query, and neither its limits nor
    a progress handler can interrupt this work.
    """
    words = [token.text.lower() for token in tokens(text)]
    if "with" not in words:
        return 1
    names = {_named(words, index) for index, word in enumerate(words) if word == "as"}
    return prod(words.count(name) for name in names if name is not None)


def _named(words: Sequence[str], index: int) -> str | None:
    """Return the name before the AS at ``index`` if a subquery follows the AS. Otherwise return None.

    A list of columns in parentheses may be between the name and the AS.
    """
    place = index - 1
    if place >= 0 and words[place] == ")":
        while place > 0 and words[place] != "(":
            place -= 1
        place -= 1
    following = next((word for word in words[index + 1 :] if word not in {"not", "materialized"}), "")
    return words[place] if place >= 0 and following == "(" else None


class Condition(NamedTuple):
    """A condition of a query: the comparison of a column with a literal, for example ``< 1950``."""

    operator: str
    """One of ``=``, ``!=``, ``<``, ``>``, ``<=``, ``>=`` and ``like``."""
    literal: Value


@dataclass
class RowRequirements:
    """The properties of a query that generated rows must suit, so that a wrong query has another result on them.
    Columns are named in lower case and without their table."""

    conditions: dict[str, list[Condition]] = field(default_factory=dict)
    """Conditions of the query (comparisons with literals), by column."""
    joined: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of columns that the query compares with each other."""
    numeric: set[str] = field(default_factory=set)
    """Columns that need numbers even if declared as text. The query has them in an aggregate function such as SUM,
    compares them with numbers, or compares them with any literal by `<`, `>`, `<=` or `>=`."""
    sorted_by: set[str] = field(default_factory=set)
    """Columns that the query sorts by."""
    rows: int = 0
    """Sum of all numbers behind LIMIT and OFFSET. A query needs about this many rows to return a full result."""
    ordered: bool = False
    """Whether the order of the result counts: whether the query has an ORDER BY outside of all parentheses."""


def row_requirements(query: str, columns: Collection[str]) -> RowRequirements:
    """Return the properties of ``query`` that generated rows must suit. ``columns`` are the columns of all tables, in
    lower case."""
    all_tokens = tokens(query, columns)
    found = RowRequirements()
    for index, token in enumerate(all_tokens):
        following = all_tokens[index + 1 :]
        if token.kind is Kind.STRING or token.kind is Kind.NUMBER:
            continue
        if token.text in {"limit", "offset"}:
            reach = following[: 3 if len(following) > 2 and following[1].text == "," else 1]
            counts = [t.text for t in reach if t.kind is Kind.NUMBER and t.text.isdigit()]
            found.rows += sum(int(count) for count in counts if len(count) < 18)
        elif token.text == "order" and following and following[0].text == "by":
            found.ordered |= token.depth == 0
            found.sorted_by.update(_sorting_columns(following, token.depth, columns))
        elif token.text in _AGGREGATES and following and following[0].text == "(":
            found.numeric.update(t.text for t in following[1:4] if t.text in columns and t.kind is Kind.WORD)
        elif token.text in _COMPARISONS or token.text in {"in", "between"}:
            _compare(found, token.text, all_tokens[:index], following, columns)
    return found


def _sorting_columns(after: Sequence[Token], depth: int, columns: Collection[str]) -> Iterator[str]:
    """Yield the columns that an ORDER BY names outside of further parentheses. ``after`` are the tokens behind ORDER.
    ``depth`` is the number of parentheses that are open at the ORDER."""
    for token in after:
        if token.text == "limit" or (token.text == ")" and token.depth < depth):
            return
        if token.kind is Kind.WORD and token.depth == depth and token.text in columns:
            yield token.text


def _compare(
    found: RowRequirements, operator: str, before: Sequence[Token], after: Sequence[Token], columns: Collection[str]
) -> None:
    """Add a comparison to ``found``, as a condition or as a pair of columns. ``before`` are the tokens on the left of
    ``operator``, and ``after`` are those on its right."""
    left = _column(reversed(before[-6:]), columns)
    right = list(_literals(after, operator))
    if left is None:
        # There is no column on the left, so the literal may be there, as in `5 < year`.
        left = _column(iter(after[:4]), columns)
        right = [_literal(before[-1])] if before and before[-1].kind in {Kind.STRING, Kind.NUMBER} else []
        operator = _MIRRORED.get(operator, operator)
    elif not right and (other := _column(iter(after[:5]), columns)):
        found.joined.append((left, other))
    if left is None or not right:
        return
    if operator == "between":
        named = list(zip((">=", "<="), right, strict=False))
    else:
        meant = "!=" if before and before[-1].text == "not" else "=" if operator == "in" else _COMPARISONS[operator]
        named = [(meant, literal) for literal in right]
    found.conditions.setdefault(left, []).extend(Condition(*pair) for pair in named)
    if any(not isinstance(literal, str) for literal in right) or operator in _MIRRORED:
        found.numeric.add(left)


def _column(near: Iterator[Token], columns: Collection[str]) -> str | None:
    """Return the first column among the tokens ``near``. None if there is none, or if a literal, a comma, or the
    beginning of another condition or clause comes before it."""
    for token in near:
        if token.kind is Kind.WORD and token.text in columns:
            return token.text
        if token.kind in {Kind.STRING, Kind.NUMBER} or token.text in {"and", "or", "where", "having", ",", "from"}:
            return None
    return None


def _literals(after: Sequence[Token], operator: str) -> Iterator[Value]:
    """Yield the literals on the right of a comparison: two for BETWEEN, the whole list for IN, and one for other
    operators."""
    left = {"between": 2, "in": len(after)}.get(operator, 1)
    skipped = {"(", "not", ",", "-", "lower", "upper"} | ({"and"} if operator == "between" else set())
    sign = 1
    for token in after:
        if token.kind in {Kind.STRING, Kind.NUMBER}:
            value = _literal(token)
            yield value if isinstance(value, str) else sign * value
            left -= 1
        elif token.text not in skipped:
            return
        if left == 0:
            return
        sign = -1 if token.text == "-" else 1


def _literal(token: Token) -> Value:
    """Return the value of a string token or number token."""
    if token.kind is Kind.STRING:
        return token.text
    return int(token.text) if token.text.isdigit() and len(token.text) < 18 else float(token.text)
