"""Grades hostile SQL, and prints what the most expensive grade cost: `python -m tests.trainer.sql_fuzz SEED COUNT`.

A statement of SQL has many places for an expression. The program fills such places in statements of the data set and of
a model with random expressions that take long, produce very large values, or fail. The output is one line of JSON: the
longest time of a grade in seconds with its statement, the peak memory in MiB of the processes that ran the queries, and
how often each problem occurred.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections import Counter

from finetune_trainer.evaluation.graders import sql

BIG = ("400000000", "900000000", "2147483647", "100000", "3999", "-1", "1e9", "9223372036854775807")
FUNCTIONS = (
    "printf('%.*c', {n}, 'x')", "format('%*d', {n}, 1)", "printf('%0{n}d', 1)", "hex(zeroblob({n}))", "zeroblob({n})",
    "replace({e}, '0', {e})", "quote({e})", "upper({e})", "trim({e}, {e})", "instr({e}, {e})", "length({e})",
    "{e} || {e}", "{e} LIKE '%a%a%a%a%a%a%a%a%a%b'", "{e} GLOB '*a*a*a*a*a*a*a*b'", "substr({e}, {n}, {n})",
    "json_array({e}, {e})", "json_extract({e}, '$')", "json_group_array({e})", "group_concat({e}, {e})", "sum({e})",
    "count({e})", "char({n}, {n})", "unicode({e})", "round({e}, {n})", "abs({e})", "{e} + {n}", "{e} % {n}",
    "strftime('%s', {e})", "julianday({e})", "CAST({e} AS TEXT)", "COALESCE({e}, {e})", "({e} IN ({e}, {e}, {e}))",
    "(SELECT {e} FROM boat)", "EXISTS (SELECT {e} FROM boat a, boat b, boat c)", "CASE {e} WHEN {e} THEN {e} END",
    "max({e}) OVER (ORDER BY {e})", "row_number() OVER (PARTITION BY {e})", "randomblob({n})", "load_extension({e})",
)  # fmt: skip
LEAVES = ("'x'", "name", "length", "NULL", "1", "'%'", "'[1,2]'", "zeroblob(4000)", "1.5e300", "x'00'")
QUERIES = (
    "SELECT {e}", "SELECT {e} FROM boat", "SELECT {e} FROM boat ORDER BY {e}", "SELECT {e} FROM boat GROUP BY {e}",
    "SELECT {e} FROM boat a, boat b, boat c, boat d, boat e", "VALUES ({e}), ({e})", "SELECT DISTINCT {e} FROM boat",
    "WITH RECURSIVE n(i) AS (SELECT {e} UNION ALL SELECT i || {e} FROM n) SELECT i FROM n",
    "WITH RECURSIVE n(i) AS (SELECT {e} UNION SELECT replace(i, 'x', 'xx') FROM n) SELECT max(i) FROM n",
    "SELECT * FROM (SELECT {e} AS a FROM boat) WHERE {e}", "SELECT {e} FROM boat LIMIT {n} OFFSET {n}",
    "SELECT {e} UNION SELECT {e} INTERSECT SELECT {e}", "SELECT * FROM json_each({e})",
    "SELECT {e} WHERE {e} HAVING {e}",
    "SELECT * FROM boat JOIN boat AS b ON {e} JOIN boat AS c ON {e}", "SELECT", "PRAGMA mmap_size = {n}", "{e}",
)  # fmt: skip
CONTEXTS = (
    "CREATE TABLE boat (id INTEGER, name TEXT, length REAL)",
    "CREATE TABLE boat AS SELECT {e} AS name, {e} AS length",
    "CREATE TABLE boat (name TEXT CHECK ({e}), length REAL)",
    "CREATE TABLE boat (name TEXT, length REAL, big TEXT AS ({e}) STORED)",
    "CREATE TABLE boat (name TEXT, length REAL, big TEXT GENERATED ALWAYS AS ({e}) VIRTUAL)",
    "CREATE TABLE boat (name TEXT DEFAULT ({e}), length REAL)",
    "CREATE TABLE boat (name TEXT, length REAL, UNIQUE (name, length)); CREATE TABLE other (a CHECK ({e}))",
    "CREATE TABLE boat (name TEXT COLLATE NOCASE, length REAL, CHECK ({e}), CHECK ({e}))",
    "CREATE TEMP TABLE boat (name, length, FOREIGN KEY (name) REFERENCES boat (name))",
    "CREATE VIRTUAL TABLE boat USING fts5(name, length)",
)  # fmt: skip


def expression(chance: random.Random, depth: int) -> str:
    if depth == 0 or chance.random() < 0.15:
        return chance.choice(LEAVES)
    return filled(chance.choice(FUNCTIONS), chance, depth - 1)


def filled(pattern: str, chance: random.Random, depth: int) -> str:
    """Return ``pattern`` with an expression in each place ``{e}`` and a number in each place ``{n}``."""
    parts = pattern.replace("{n}", "\0n\0").replace("{e}", "\0e\0").split("\0")
    return "".join(
        chance.choice(BIG) if part == "n" else expression(chance, depth) if part == "e" else part for part in parts
    )


def main() -> None:
    chance, count = random.Random(int(sys.argv[1])), int(sys.argv[2])
    problems: Counter[str] = Counter()
    longest, statement = 0.0, ""
    for _ in range(count):
        context = filled(chance.choice(CONTEXTS), chance, chance.randrange(4)) if chance.random() < 0.4 else CONTEXTS[0]
        gold = (
            "SELECT name FROM boat"
            if chance.random() < 0.7
            else filled(chance.choice(QUERIES), chance, chance.randrange(3))
        )
        answer = filled(chance.choice(QUERIES), chance, chance.randrange(5))
        begun = time.monotonic()
        grade = sql.grade(answer, {"context": context, "answer": gold})
        took = time.monotonic() - begun
        if took > longest:
            longest, statement = took, f"{answer} | {context} | {gold}"
        assert grade.is_graded or grade.problem
        problems[grade.problem or "none"] += 1
    sql.close()
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(json.dumps({"seconds": longest, "memory": memory, "problems": problems, "statement": statement}))


if __name__ == "__main__":
    main()
