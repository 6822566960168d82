"""Generates rows on which a gold query says something: its literals are in them, and rows that just miss it.

In come tables, what the gold query demands of rows, and a random generator; out come rows per table. There are no
NULLs: the questions never say what a missing value means, and people take COUNT(*) and COUNT(column) for the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

from finetune_trainer.evaluation.graders.sql_sandbox import Affinity, Column
from finetune_trainer.evaluation.graders.sql_text import Condition, Demands, Value

WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "indigo", "jasper", "kestrel", "lagoon",
    "maple", "nectar", "onyx", "poplar", "quartz", "raven", "sable", "topaz", "umber", "violet", "willow", "zephyr",
)  # fmt: skip
MAX_TABLE_ROWS = 60
_RANDOM_ROWS = 5
_ALL = range(100, 1000)
_SMALL, _MIDDLE, _LARGE = _ALL[:300], _ALL[300:600], _ALL[600:]
"""Of three digits, so that as text they sort as they do as numbers."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")

Tables = Mapping[str, Sequence[Column]]


def generate(tables: Tables, demands: Demands, random: Random) -> dict[str, list[list[Value]]]:
    """Return rows for each table, in random order.

    Witnesses satisfy every condition of the query at once, where one value can; the first does so as narrowly as it
    can, and is there twice, so that DISTINCT and UNION show. Two rows for each condition miss it narrowly, and nothing
    else; they hold the largest and the smallest of what the query calculates with or sorts by. The rest is random, from
    a few values per column, so that rows meet in joins and groups; columns that the query compares share theirs.
    """
    return Generator(demands, random).rows(tables)


class Generator:
    """The values of the columns of one database."""

    def __init__(self, demands: Demands, random: Random) -> None:
        self._demands = demands
        self._random = random
        self._variety = random.choice((2, 3, 5, 8))
        self._sorted_apart = random.random() < 0.7
        """Whether columns that the query sorts by differ in nearly every row: what is tied has no definite order."""
        self._pools: dict[str, list[Value]] = {}
        self._class = _classes(demands.joined)

    def rows(self, tables: Tables) -> dict[str, list[list[Value]]]:
        """Return the rows of every table."""
        return {name: self._table(columns) for name, columns in tables.items()}

    def _table(self, columns: Sequence[Column]) -> list[list[Value]]:
        witnesses = [self._witness(columns, turn) for turn in range(3)]
        rows = [*witnesses, list(witnesses[0])]
        for place, column in enumerate(columns):
            for condition in self._demands.conditions.get(column.name.lower(), []):
                for numbers in self._random.sample((_SMALL, _LARGE), 2):
                    row = self._witness(columns, len(rows), numbers)
                    row[place] = self._miss(condition, column)
                    rows.append(row)
        wanted = min(max(_RANDOM_ROWS, self._demands.rows + 3 - len(rows)), MAX_TABLE_ROWS)
        rows += [[self._any(column) for column in columns] for _ in range(wanted)]
        for place, column in enumerate(columns):
            if column.key and column.name.lower() not in self._demands.conditions:
                self._make_unique(rows, place, column)
        self._random.shuffle(rows)
        return rows

    def _make_unique(self, rows: Sequence[list[Value]], place: int, column: Column) -> None:
        """Give rows of a table another key where theirs is taken, or sqlite would leave them out."""
        taken: set[Value] = set()
        for row in rows:
            if row[place] in taken:
                number = self._random.randrange(100, 1000)
                while _typed(number, column) in taken:
                    number += 1
                row[place] = _typed(number, column)
            taken.add(row[place])

    def _witness(self, columns: Sequence[Column], turn: int, numbers: range | None = None) -> list[Value]:
        """Return a row that satisfies the conditions; where no value satisfies all of a column's, they take turns."""
        row: list[Value] = []
        if numbers is None:
            numbers = _MIDDLE if turn else self._random.choice((_MIDDLE[:1], _MIDDLE[-1:]))
        for column in columns:
            conditions = self._demands.conditions.get(column.name.lower(), [])
            if conditions:
                candidates = [value for condition in conditions for value in self._satisfying(condition, column)]
                best = [c for c in candidates if all(_holds(condition, c) for condition in conditions)]
                pick = best or self._satisfying(conditions[turn % len(conditions)], column)
                row.append(self._random.choice(pick) if turn else _nearest(conditions[0].literal, pick))
            elif column.name.lower() in self._class:
                row.append(self._pool(column)[turn % 2])
            else:
                row.append(self._other(column, numbers))
        return row

    def _miss(self, condition: Condition, column: Column) -> Value:
        """Return a value that does not satisfy a condition: its very literal, or one near it."""
        if not _holds(condition, condition.literal):
            return _typed(condition.literal, column)
        near = [value for value in _neighbours(condition.literal, column) if not _holds(condition, value)]
        return self._random.choice(near or self._pool(column))

    def _any(self, column: Column) -> Value:
        """Return a random value, near a literal of the query where there is one."""
        conditions = self._demands.conditions.get(column.name.lower(), [])
        if conditions and self._random.random() < 0.5:
            literal = self._random.choice(conditions).literal
            return self._random.choice([_typed(literal, column), *_neighbours(literal, column)])
        return self._other(column, _ALL)

    def _other(self, column: Column, numbers: range) -> Value:
        """Return a random value for a column without conditions: one of ``numbers`` where its size matters."""
        name = column.name.lower()
        spread = name in self._demands.numeric or (name in self._demands.sorted_by and self._sorted_apart)
        if not spread or name in self._class:
            return self._random.choice(self._pool(column))
        number = self._random.choice(numbers)
        if column.affinity is Affinity.NUMBER or name in self._demands.numeric:
            return _typed(number, column)
        return f"{WORDS[(number - _ALL[0]) * len(WORDS) // len(_ALL)]} {number}"

    def _satisfying(self, condition: Condition, column: Column) -> list[Value]:
        literal = condition.literal
        if condition.operator == "like":
            filled = str(literal).replace("_", "a")
            values: list[Value] = [filled.replace("%", word) for word in ("", self._random.choice(WORDS))]
            return values
        values = [_typed(literal, column), *_neighbours(literal, column)]
        if condition.operator == "=":
            return values[:1]
        return [value for value in values if _holds(condition, value)] or values

    def _pool(self, column: Column) -> list[Value]:
        """Return the few values that a column has in this database; joined columns share theirs."""
        name = column.name.lower()
        key = self._class.get(name, name)
        if key not in self._pools:
            number = column.affinity is Affinity.NUMBER or name in self._demands.numeric
            size = max(self._variety, 2)
            numbers: list[Value] = [*self._random.sample(range(1, 100), size)]
            words: list[Value] = [*self._random.sample(WORDS, size)]
            self._pools[key] = numbers if number else [*words[:-1], str(numbers[0])]
        return [_typed(value, column) for value in self._pools[key]]


def _classes(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a representative for each column that is compared with another one."""
    representative: dict[str, str] = {}
    for left, right in pairs:
        old, new = representative.get(right, right), representative.get(left, left)
        representative |= {left: new, right: new}
        representative.update({name: new for name, value in representative.items() if value == old})
    return representative


def _number(value: Value) -> int | float | None:
    """Return a value as a number, if it is or reads as one."""
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        return None
    return float(value) if "." in value or len(value) > 17 else int(value)


def _typed(value: Value, column: Column) -> Value:
    """Return the value as the column stores it: sqlite turns numbers in a column of text into text."""
    number = _number(value)
    if column.affinity is Affinity.NUMBER:
        return value if number is None else number
    return str(value) if column.affinity is Affinity.TEXT else value


def _neighbours(literal: Value, column: Column) -> list[Value]:
    """Return values around a literal: larger and smaller, as numbers and as text, and in another case."""
    number = _number(literal)
    if number is not None:
        return [_typed(number + step, column) for step in (-7, -1, 1, 2, 9)]
    text = str(literal)
    others = {text + " " + WORDS[0], text[:-1], text.swapcase(), text.title(), WORDS[3]} - {text}
    return sorted(others)


def _nearest(literal: Value, values: Sequence[Value]) -> Value:
    """Return the value nearest to a literal, the first one where they aren't numbers."""
    wanted = _number(literal)
    numbers = [_number(value) for value in values]
    if wanted is None or None in numbers:
        return values[0]
    return min(values, key=lambda value: abs((_number(value) or 0) - wanted))


def _holds(condition: Condition, value: Value) -> bool:
    """Return whether a value satisfies a condition, numbers compared as numbers and all else as text."""
    left, right = _number(value), _number(condition.literal)
    if left is None or right is None:
        return _compare(condition.operator, str(value), str(condition.literal))
    return _compare(condition.operator, left, right)


def _like_pattern(pattern: str) -> str:
    """Return a LIKE pattern as a regular expression."""
    return re.escape(pattern).replace("%", ".*").replace("_", ".")


def _compare(operator: str, left: float | str, right: float | str) -> bool:
    smaller = left < right  # type: ignore[operator]
    return {
        "=": left == right,
        "like": bool(re.fullmatch(_like_pattern(str(right)), str(left), re.IGNORECASE | re.DOTALL)),
        "!=": left != right,
        "<": smaller,
        "<=": smaller or left == right,
        ">": not smaller and left != right,
        ">=": not smaller,
    }[operator]
