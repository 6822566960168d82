"""The grader of SQL: a question about tables is answered by a query, and the query is judged by running it.

The row's column `context` holds CREATE TABLE statements, and `answer` holds the reference query. Answer and reference
query run on several random databases that `sql_rows.py` makes for the reference query, in the sandbox of
`sql_sandbox.py`, and must return the same rows. `evaluation/scorer.py` calls `grade` for every generated answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from random import Random
from typing import NamedTuple

from finetune_core.tasks import SQL
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.sql_rows import generate
from finetune_trainer.evaluation.graders.sql_sandbox import Cell, QueryFailed, Sandbox
from finetune_trainer.evaluation.graders.sql_text import row_requirements

DATABASES = 5
"""Most databases that an answer runs on; a wrong query is graded as right only if it agrees on all by chance."""
ENOUGH = 2
"""Fewest usable databases with which an answer can be graded."""
ATTEMPTS = 20
"""Most databases that are made for a row to find ``DATABASES`` usable databases."""

Rows = list[tuple[Cell, ...]]


class Case(NamedTuple):
    """A database, and the rows that the reference query returns on the database."""

    sandbox: Sandbox
    expected: Rows


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    """Return whether ``answer`` returns the same rows as the row's reference query on every database made for the row.

    Rows are compared as a multiset, and in order only where the reference query has an ORDER BY. Columns are compared
    by place and not by name, numbers by value. As in test-suite accuracy (Zhong et al. 2020, Distilled Test Suites),
    several databases are made, so that similar queries differ from the reference query on at least one of them.

    A database is usable only if the reference query returns something on it, because otherwise every query without a
    result would be right, and only if the order in which sqlite visits rows does not change the result. A row is left
    out where fewer than ``ENOUGH`` usable databases are found, or where sqlite can't run the row's tables or query.
    """
    context, query = str(row.get("context", "")), str(row.get("answer", ""))
    with ExitStack() as stack:
        try:
            ordered, cases = _cases(stack, context, query)
        except QueryFailed as error:
            return Grade.left_out(f"the gold row {error}")
        if len(cases) < ENOUGH:
            return Grade.left_out("the gold query returns nothing, or nothing definite, on generated rows")
        try:
            right = all(
                _same(case.sandbox.run(answer, reverse=reverse), case.expected, ordered)
                for case in cases
                for reverse in (False, True)
            )
        except QueryFailed as error:
            return Grade.of(SQL, {}, problem=f"the query {error}")
        return Grade.of(SQL, {"execution": right})


def _cases(stack: ExitStack, context: str, query: str) -> tuple[bool, list[Case]]:
    """Return whether the reference query has an ORDER BY outside of parentheses, and usable databases for the query."""
    cases: list[Case] = []
    ordered = False
    nothing: Rows | None = None
    for random in _seeds(context, query):
        sandbox = stack.enter_context(Sandbox(context))
        tables = sandbox.tables()
        wanted = row_requirements(query, {column.name.lower() for columns in tables.values() for column in columns})
        ordered = wanted.ordered
        nothing = sandbox.run(query) if nothing is None else nothing
        for table, rows in generate(tables, wanted, random).items():
            sandbox.insert(table, rows)
        expected = sandbox.run(query)
        if expected != nothing and _is_telling(expected) and _same(sandbox.run(query, reverse=True), expected, ordered):
            cases.append(Case(sandbox, expected))
            if len(cases) == DATABASES:
                break
    return ordered, cases


def _seeds(context: str, query: str) -> Iterator[Random]:
    """Yield a random generator for each database, seeded by the row alone, so that a grade can be repeated."""
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256(f"{attempt}\n{context}\n{query}".encode(errors="surrogatepass")).digest()
        yield Random(digest)  # noqa: S311  (rows, not secrets)


def _is_telling(rows: Rows) -> bool:
    """Return whether a result has a value besides NULL and 0, which many queries return where no row matches."""
    return any(cell is not None and cell != 0 for row in rows for cell in row)


def _same(left: Rows, right: Rows, ordered: bool) -> bool:
    """Return whether two results have the same rows, in the same order where ``ordered`` is true."""
    plain_left, plain_right = [_plain(row) for row in left], [_plain(row) for row in right]
    return plain_left == plain_right if ordered else Counter(plain_left) == Counter(plain_right)


def _plain(row: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Return the row with floats of ten digits, because the order of addition changes the last digits of a sum."""
    return tuple(float(f"{cell:.10g}") if isinstance(cell, float) else cell for cell in row)
