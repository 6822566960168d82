"""Makes rows of the SQL task's kind: a question, the table, and the query that answers the question.

`rows.py` calls `rows`. Tables, columns and questions were written for this file. The form is that of published rows
with a question, CREATE TABLE statements as context, and a query (Zhong et al. 2017, WikiSQL).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

Row = dict[str, str]
COMPARISONS = {">": "more than", "<": "less than"}
WORDS = {"MAX": "highest", "MIN": "lowest", "AVG": "average", "SUM": "total"}
MOST_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its name, its columns of text with their values, its columns of numbers with their greatest values."""

    name: str
    texts: dict[str, tuple[str, ...]]
    numbers: dict[str, int]


TABLES = (
    Table("ferries", {"route": ("Skye", "Mull", "Arran", "Islay"), "captain": ("Reid", "Moss", "Lund")},
          {"seats": 900, "crew": 60}),
    Table("bridges", {"river": ("Elbe", "Oder", "Main", "Saale"), "type": ("arch", "beam", "truss")},
          {"length": 2000, "year_built": 2020}),
    Table("players", {"team": ("Falcons", "Comets", "Bears", "Pilots"), "position": ("guard", "center", "forward")},
          {"points": 60, "age": 40}),
    Table("observatories", {"country": ("Chile", "Spain", "India", "Kenya"), "telescope": ("optical", "radio")},
          {"altitude": 5000, "domes": 12}),
    Table("albums", {"artist": ("Vega", "Lumen", "The Ports", "Kite"), "label": ("Marlow", "Tin", "Eastside")},
          {"tracks": 24, "copies": 90000}),
    Table("trains", {"destination": ("Graz", "Brno", "Lyon", "Turin"), "operator": ("Nordic", "Alpen", "Coast")},
          {"platform": 20, "delay": 90}),
    Table("novels", {"author": ("Hale", "Okoye", "Brandt", "Silva"), "genre": ("crime", "fantasy", "satire")},
          {"pages": 1200, "rank": 100}),
    Table("orchards", {"fruit": ("plum", "apple", "cherry", "quince"), "region": ("north", "south", "coast")},
          {"trees": 4000, "harvest": 900}),
)  # fmt: skip


def rows(chance: random.Random) -> Iterator[Row]:
    """Yield rows with the columns `question`, `context` and `query`, without end. A row may occur again. The question
    holds the CREATE TABLE statement too, because it is the whole of what the model is told."""
    while True:
        table = chance.choice(TABLES)
        sentence, query, used = chance.choice((_lookup, _aggregate, _count))(table, chance)
        # A table has the columns of its query, and one more where there is room, as the published rows have.
        others = [name for name in (*table.texts, *table.numbers) if name not in used]
        columns = [*used, *others[: max(0, MOST_COLUMNS - len(used))]]
        chance.shuffle(columns)
        typed = ", ".join(f"{name} {'INTEGER' if name in table.numbers else 'VARCHAR'}" for name in columns)
        context = f"CREATE TABLE {table.name} ({typed})"
        yield {"question": f"{sentence} {context}", "context": context, "query": query}


def _where(table: Table, chance: random.Random) -> tuple[str, str, str]:
    """Return a condition: in words, in SQL, and its column."""
    if chance.random() < 0.5:
        column, values = chance.choice(sorted(table.texts.items()))
        word = chance.choice(values)
        return f"whose {_said(column)} is {word}", f"{column} = '{word}'", column
    column, greatest = chance.choice(sorted(table.numbers.items()))
    value, sign = chance.randint(1, greatest), chance.choice(sorted(COMPARISONS))
    return f"with {COMPARISONS[sign]} {value} as {_said(column)}", f"{column} {sign} {value}", column


def _lookup(table: Table, chance: random.Random) -> tuple[str, str, list[str]]:
    words, condition, column = _where(table, chance)
    wanted = chance.choice([name for name in (*table.texts, *table.numbers) if name != column])
    return (
        f"What is the {_said(wanted)} of the {table.name} {words}?",
        f"SELECT {wanted} FROM {table.name} WHERE {condition}",  # noqa: S608
        [wanted, column],
    )


def _aggregate(table: Table, chance: random.Random) -> tuple[str, str, list[str]]:
    words, condition, column = _where(table, chance)
    wanted = chance.choice([name for name in table.numbers if name != column])
    function = chance.choice(sorted(WORDS))
    return (
        f"What is the {WORDS[function]} {_said(wanted)} of the {table.name} {words}?",
        f"SELECT {function}({wanted}) FROM {table.name} WHERE {condition}",  # noqa: S608
        [wanted, column],
    )


def _count(table: Table, chance: random.Random) -> tuple[str, str, list[str]]:
    words, condition, column = _where(table, chance)
    return (
        f"How many {table.name} are there {words}?",
        f"SELECT COUNT(*) FROM {table.name} WHERE {condition}",  # noqa: S608
        [column],
    )


def _said(column: str) -> str:
    return column.replace("_", " ")
