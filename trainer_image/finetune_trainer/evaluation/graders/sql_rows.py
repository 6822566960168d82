"""Generates rows on which a reference query and similar queries return different results.

Some rows match the query's literals, others narrowly miss them. `sql.py` calls `generate` with the tables, the query's
requirements and a random generator. No value is NULL, because the questions of the data set never say what a missing
value means, and people use COUNT(*) and COUNT(column) for the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

from finetune_trainer.evaluation.graders.sql_sandbox import Affinity, Column
from finetune_trainer.evaluation.graders.sql_text import Condition, RowRequirements, Value

WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "indigo", "jasper", "kestrel", "lagoon",
    "maple", "nectar", "onyx", "poplar", "quartz", "raven", "sable", "topaz", "umber", "violet", "willow", "zephyr",
)  # fmt: skip
MAX_TABLE_ROWS = 60
_RANDOM_ROWS = 5
"""Fewest random rows of a table, beside those that match or miss the query."""
_ALL = range(100, 1000)
_SMALL, _MIDDLE, _LARGE = _ALL[:300], _ALL[300:600], _ALL[600:]
"""Lower, middle and upper numbers of three digits, because texts of three digits sort in the order of the numbers."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")

Tables = Mapping[str, Sequence[Column]]


def generate(tables: Tables, requirements: RowRequirements, random: Random) -> dict[str, list[list[Value]]]:
    """Return rows for each table, in random order.

    - Matching rows satisfy every condition of the query at once, where one value can. The first matching row is as
      near to the literals as possible and stands in the table twice, so that DISTINCT and UNION change the result.
    - For each condition two rows narrowly miss the condition and satisfy the others. These two rows have the largest
      and the smallest numbers in the columns that the query calculates with or sorts by.
    - All other rows are random. Each column has few values, so that joins and groups find rows, and columns that the
      query compares with each other have the same values.
    """
    return RowGenerator(requirements, random).rows(tables)


class RowGenerator:
    """Generates the rows of one database; a column without a condition draws its values from a small pool."""

    def __init__(self, requirements: RowRequirements, random: Random) -> None:
        self._requirements = requirements
        self._random = random
        self._variety = random.choice((2, 3, 5, 8))
        self._sorted_apart = random.random() < 0.7
        """Whether a sorted column differs in nearly every row, because rows that tie have no definite order."""
        self._pools: dict[str, list[Value]] = {}
        self._class = _classes(requirements.joined)

    def rows(self, tables: Tables) -> dict[str, list[list[Value]]]:
        """Return the rows of every table."""
        return {name: self._table(columns) for name, columns in tables.items()}

    def _table(self, columns: Sequence[Column]) -> list[list[Value]]:
        witnesses = [self._witness(columns, turn) for turn in range(3)]
        rows = [*witnesses, list(witnesses[0])]
        for place, column in enumerate(columns):
            for condition in self._requirements.conditions.get(column.name.lower(), []):
                for numbers in self._random.sample((_SMALL, _LARGE), 2):
                    row = self._witness(columns, len(rows), numbers)
                    row[place] = self._near_miss(condition, column)
                    rows.append(row)
        wanted = min(max(_RANDOM_ROWS, self._requirements.rows + 3 - len(rows)), MAX_TABLE_ROWS)
        rows += [[self._random_value(column) for column in columns] for _ in range(wanted)]
        for place, column in enumerate(columns):
            if column.key and column.name.lower() not in self._requirements.conditions:
                self._make_unique(rows, place, column)
        self._random.shuffle(rows)
        return rows

    def _make_unique(self, rows: Sequence[list[Value]], place: int, column: Column) -> None:
        """Replace each primary key that another row has too, because sqlite refuses the second of two equal keys."""
        taken: set[Value] = set()
        for row in rows:
            if row[place] in taken:
                number = self._random.randrange(100, 1000)
                while _typed(number, column) in taken:
                    number += 1
                row[place] = _typed(number, column)
            taken.add(row[place])

    def _witness(self, columns: Sequence[Column], turn: int, numbers: range | None = None) -> list[Value]:
        """Return a row that satisfies the conditions of the query.

        Where no value satisfies all conditions of a column, ``turn`` chooses the condition that is satisfied.
        ``numbers``: the range for columns without a condition, if their size matters.
        """
        row: list[Value] = []
        if numbers is None:
            numbers = _MIDDLE if turn else self._random.choice((_MIDDLE[:1], _MIDDLE[-1:]))
        for column in columns:
            conditions = self._requirements.conditions.get(column.name.lower(), [])
            if conditions:
                candidates = [value for condition in conditions for value in self._satisfying(condition, column)]
                best = [c for c in candidates if all(_holds(condition, c) for condition in conditions)]
                pick = best or self._satisfying(conditions[turn % len(conditions)], column)
                row.append(self._random.choice(pick) if turn else _nearest(conditions[0].literal, pick))
            elif column.name.lower() in self._class:
                row.append(self._pool(column)[turn % 2])
            else:
                row.append(self._free_value(column, numbers))
        return row

    def _near_miss(self, condition: Condition, column: Column) -> Value:
        """Return a value that does not satisfy ``condition``: the condition's literal, or a value near the literal."""
        if not _holds(condition, condition.literal):
            return _typed(condition.literal, column)
        near = [value for value in _neighbours(condition.literal, column) if not _holds(condition, value)]
        return self._random.choice(near or self._pool(column))

    def _random_value(self, column: Column) -> Value:
        """Return a random value for ``column``.

        If the query compares the column with literals, half of the values are a literal or lie near a literal.
        """
        conditions = self._requirements.conditions.get(column.name.lower(), [])
        if conditions and self._random.random() < 0.5:
            literal = self._random.choice(conditions).literal
            return self._random.choice([_typed(literal, column), *_neighbours(literal, column)])
        return self._free_value(column, _ALL)

    def _free_value(self, column: Column, numbers: range) -> Value:
        """Return a random value for a column without conditions.

        The value is one of ``numbers`` if the query calculates with the column or sorts by it.
        """
        name = column.name.lower()
        spread = name in self._requirements.numeric or (name in self._requirements.sorted_by and self._sorted_apart)
        if not spread or name in self._class:
            return self._random.choice(self._pool(column))
        number = self._random.choice(numbers)
        if column.affinity is Affinity.NUMBER or name in self._requirements.numeric:
            return _typed(number, column)
        return f"{WORDS[(number - _ALL[0]) * len(WORDS) // len(_ALL)]} {number}"

    def _satisfying(self, condition: Condition, column: Column) -> list[Value]:
        """Return values that satisfy ``condition``, or values near the condition's literal if none satisfies."""
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
        """Return the few values that a column has in this database; columns that are joined have the same values."""
        name = column.name.lower()
        key = self._class.get(name, name)
        if key not in self._pools:
            number = column.affinity is Affinity.NUMBER or name in self._requirements.numeric
            size = max(self._variety, 2)
            numbers: list[Value] = [*self._random.sample(range(1, 100), size)]
            words: list[Value] = [*self._random.sample(WORDS, size)]
            self._pools[key] = numbers if number else [*words[:-1], str(numbers[0])]
        return [_typed(value, column) for value in self._pools[key]]


def _classes(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a representative for each column of ``pairs``; columns that are compared, also by way of a third column,
    have the same representative."""
    representative: dict[str, str] = {}
    for left, right in pairs:
        old, new = representative.get(right, right), representative.get(left, left)
        representative |= {left: new, right: new}
        representative.update({name: new for name, value in representative.items() if value == old})
    return representative


def _number(value: Value) -> int | float | None:
    """Return ``value`` as a number, None where ``value`` is text that is not written as a number."""
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        return None
    return float(value) if "." in value or len(value) > 17 else int(value)


def _typed(value: Value, column: Column) -> Value:
    """Return ``value`` as the column stores it, because sqlite turns numbers in a column of text into text."""
    number = _number(value)
    if column.affinity is Affinity.NUMBER:
        return value if number is None else number
    return str(value) if column.affinity is Affinity.TEXT else value


def _neighbours(literal: Value, column: Column) -> list[Value]:
    """Return values near ``literal``: larger and smaller numbers, or longer, shorter and differently cased texts."""
    number = _number(literal)
    if number is not None:
        return [_typed(number + step, column) for step in (-7, -1, 1, 2, 9)]
    text = str(literal)
    others = {text + " " + WORDS[0], text[:-1], text.swapcase(), text.title(), WORDS[3]} - {text}
    return sorted(others)


def _nearest(literal: Value, values: Sequence[Value]) -> Value:
    """Return the value that is nearest to ``literal``, or the first value where not all of them are numbers."""
    wanted = _number(literal)
    numbers = [_number(value) for value in values]
    if wanted is None or None in numbers:
        return values[0]
    return min(values, key=lambda value: abs((_number(value) or 0) - wanted))


def _holds(condition: Condition, value: Value) -> bool:
    """Return whether ``value`` satisfies ``condition``; two numbers are compared as numbers, anything else as text."""
    left, right = _number(value), _number(condition.literal)
    if left is None or right is None:
        return _compare(condition.operator, str(value), str(condition.literal))
    return _compare(condition.operator, left, right)


def _like_pattern(pattern: str) -> str:
    """Return a LIKE pattern as a regular expression."""
    return re.escape(pattern).replace("%", ".*").replace("_", ".")


def _compare(operator: str, left: float | str, right: float | str) -> bool:
    """Return whether the comparison ``left operator right`` holds; both sides are numbers, or both are text."""
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
