"""Generates table rows on which a reference query and similar queries have different results.

Some rows match the literals in the reference query, and others narrowly miss them. `sql_judge.py` calls `generate` with
the tables, what `sql_text.py` read from the query, and a random generator. No value is NULL, because the questions of
the data set do not say what a missing value means, and people use COUNT(*) and COUNT(column) with the same meaning.
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
"""Each table gets at least this many random rows in addition to the rows that match or narrowly miss the query."""
_ALL = range(100, 1000)
_SMALL, _MIDDLE, _LARGE = _ALL[:300], _ALL[300:600], _ALL[600:]
"""Small, middle and large numbers. All have three digits, so that they sort in the same order as numbers and as
texts.
"""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")

Tables = Mapping[str, Sequence[Column]]


def generate(tables: Tables, requirements: RowRequirements, random: Random) -> dict[str, list[list[Value]]]:
    """Generate rows for every table, in random order, and return them by the table's name.

    - Matching rows satisfy all conditions of the query, as far as one value can satisfy all conditions of a column. The
      first matching row is as near to the literals as possible. The table has this row twice, so that DISTINCT and
      UNION change the result.
    - For each condition, two rows narrowly miss this condition, and satisfy the conditions of all other columns. In the
      columns without conditions that the query calculates with or sorts by, one of the two rows has large numbers and
      the other has small numbers.
    - All other rows are random. Most columns have only a few values, so that joins and groups find rows. Columns that
      the query compares with each other have the same values.
    """
    return RowGenerator(requirements, random).rows(tables)


class RowGenerator:
    """Generates the rows of one database. Its attributes keep what is drawn once for the whole database, such as the
    few values of a column."""

    def __init__(self, requirements: RowRequirements, random: Random) -> None:
        self._requirements = requirements
        self._random = random
        self._variety = random.choice((2, 3, 5, 8))
        self._sorted_apart = random.random() < 0.7
        """Whether a column that the query sorts by gets many different values in this database, so that the order of
        rows is definite. It is True for most databases."""
        self._pools: dict[str, list[Value]] = {}
        self._class = _classes(requirements.joined)

    def rows(self, tables: Tables) -> dict[str, list[list[Value]]]:
        """Generate rows for every table, and return them by the table's name."""
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
        """Give each row its own primary key, because sqlite refuses a row whose key another row has. ``column`` is the
        primary key, and ``place`` is its index in a row."""
        taken: set[Value] = set()
        for row in rows:
            if row[place] in taken:
                number = self._random.randrange(100, 1000)
                while _typed(number, column) in taken:
                    number += 1
                row[place] = _typed(number, column)
            taken.add(row[place])

    def _witness(self, columns: Sequence[Column], turn: int, numbers: range | None = None) -> list[Value]:
        """Generate a row that satisfies all conditions of the query.

        Where no value satisfies all conditions of a column, ``turn`` chooses which of them is satisfied. The row of
        turn 0 is as near to the literals as possible. ``numbers`` is the range for columns without conditions, where
        the query calculates with them or sorts by them. None stands for middle numbers.
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
        """Return a value that does not satisfy ``condition``: its literal, or else a value near the literal. If all of
        these satisfy the condition, return one of the column's few values, which may satisfy the condition too."""
        if not _holds(condition, condition.literal):
            return _typed(condition.literal, column)
        near = [value for value in _neighbours(condition.literal, column) if not _holds(condition, value)]
        return self._random.choice(near or self._pool(column))

    def _random_value(self, column: Column) -> Value:
        """Return a random value for ``column``.

        If the query compares the column with literals, about every second value is such a literal or lies near one.
        """
        conditions = self._requirements.conditions.get(column.name.lower(), [])
        if conditions and self._random.random() < 0.5:
            literal = self._random.choice(conditions).literal
            return self._random.choice([_typed(literal, column), *_neighbours(literal, column)])
        return self._free_value(column, _ALL)

    def _free_value(self, column: Column, numbers: range) -> Value:
        """Return a random value, without regard to conditions: one of the column's few values.

        The value is made from one of ``numbers`` instead if the query calculates with the column, or if it sorts by the
        column and `_sorted_apart` is True. Neither counts if the query compares the column with another column.
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
        """Return values that satisfy ``condition``. If none is found, return values near its literal."""
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
        """Return the few values of ``column`` in this database, which do not depend on conditions. Columns that the
        query compares with each other have the same values."""
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
    """Group the columns of ``pairs``, and return for each column the name of its group. Two columns are in one group if
    the query compares them, directly or through other columns. The name of a group is one of its columns."""
    representative: dict[str, str] = {}
    for left, right in pairs:
        old, new = representative.get(right, right), representative.get(left, left)
        representative |= {left: new, right: new}
        representative.update({name: new for name, value in representative.items() if value == old})
    return representative


def _number(value: Value) -> int | float | None:
    """Return ``value`` as a number, or None if it is a text that is not written like a number."""
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        return None
    return float(value) if "." in value or len(value) > 17 else int(value)


def _typed(value: Value, column: Column) -> Value:
    """Return ``value`` as sqlite stores it in ``column``. For example, a column of type TEXT turns numbers into
    text."""
    number = _number(value)
    if column.affinity is Affinity.NUMBER:
        return value if number is None else number
    return str(value) if column.affinity is Affinity.TEXT else value


def _neighbours(literal: Value, column: Column) -> list[Value]:
    """Return values near ``literal``. For a number these are slightly larger and smaller numbers. For a text they are
    longer and shorter texts, the text in other case, and another word."""
    number = _number(literal)
    if number is not None:
        return [_typed(number + step, column) for step in (-7, -1, 1, 2, 9)]
    text = str(literal)
    others = {text + " " + WORDS[0], text[:-1], text.swapcase(), text.title(), WORDS[3]} - {text}
    return sorted(others)


def _nearest(literal: Value, values: Sequence[Value]) -> Value:
    """Return the number in ``values`` that is nearest to ``literal``. If ``literal`` or one of ``values`` is no number,
    return the first value."""
    wanted = _number(literal)
    numbers = [_number(value) for value in values]
    if wanted is None or None in numbers:
        return values[0]
    return min(values, key=lambda value: abs((_number(value) or 0) - wanted))


def _holds(condition: Condition, value: Value) -> bool:
    """Return whether ``value`` satisfies ``condition``. If both sides are numbers they are compared as numbers, else as
    text."""
    left, right = _number(value), _number(condition.literal)
    if left is None or right is None:
        return _compare(condition.operator, str(value), str(condition.literal))
    return _compare(condition.operator, left, right)


def _like_pattern(pattern: str) -> str:
    """Turn a LIKE pattern into a regular expression."""
    return re.escape(pattern).replace("%", ".*").replace("_", ".")


def _compare(operator: str, left: float | str, right: float | str) -> bool:
    """Return whether ``left operator right`` is true. Both sides must be numbers, or both must be texts."""
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
