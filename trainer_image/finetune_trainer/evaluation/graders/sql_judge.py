"""Judges a query by running it: the part of the SQL grader that runs in a child process.

The row's column `context` holds CREATE TABLE statements, and the column `answer` holds the reference query. The
generated query and the reference query must return the same rows on several random databases. `sql_rows.py` fills these
databases to suit the reference query, and `sql_sandbox.py` runs the queries. `sql_child.py` calls `judge` for every
generated answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import NamedTuple

from finetune_core.tasks import SQL
from finetune_trainer.evaluation.graders.grades import Grade
from finetune_trainer.evaluation.graders.sql_rows import generate
from finetune_trainer.evaluation.graders.sql_sandbox import Cell, QueryFailed, Sandbox
from finetune_trainer.evaluation.graders.sql_text import row_requirements

DATABASES = 5
"""Largest number of databases that an answer runs on. With several databases, a wrong query hardly ever returns the
right rows on all of them by chance.
"""
ENOUGH = 2
"""Smallest number of usable databases with which an answer can be graded (see `judge`)."""
ATTEMPTS = 20
"""Largest number of databases that are tried for a row of the evaluation set until `DATABASES` usable ones are found.
"""

Rows = list[tuple[Cell, ...]]


class Case(NamedTuple):
    """A database, and the rows that the reference query returns on it."""

    sandbox: Sandbox
    expected: Rows


def judge(answer: str, context: str, query: str, reference_done: Callable[[], None] = lambda: None) -> Grade:
    """Return the grade of ``answer``, which is right if it returns the same rows as the reference ``query`` on each of
    up to `DATABASES` usable databases with the tables of ``context``.

    ``reference_done`` is called between the work on the reference query and the work on ``answer``.

    The order of rows counts only if the reference query has an ORDER BY. Names of columns do not count, only their
    order. Numbers are compared by value. Several databases are used, so that a query that is only similar to the
    reference query differs on at least one of them. This is test-suite accuracy (Zhong et al. 2020, Distilled Test
    Suites).

    A database is usable if two conditions hold. First, the result of the reference query has a value other than NULL
    and 0, and differs from the query's result on empty tables, because otherwise a query that finds no rows could be
    right. Second, the result does not depend on the order in which sqlite visits the rows. The row can't be used if
    fewer than `ENOUGH` usable databases are found, or if sqlite can't run its statements.
    """
    with ExitStack() as stack:
        try:
            ordered, cases = _cases(stack, context, query)
        except QueryFailed as error:
            return Grade.left_out(f"the gold row {error}")
        if len(cases) < ENOUGH:
            return Grade.left_out("the gold query returns nothing, or nothing definite, on generated rows")
        reference_done()
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
    """Make the usable databases of a row in sandboxes, which ``stack`` closes. Return whether the order of rows counts,
    and the databases."""
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
    """Yield a random generator for each database. Its seed depends only on the row, so that a grade can be repeated."""
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256(f"{attempt}\n{context}\n{query}".encode(errors="surrogatepass")).digest()
        yield Random(digest)  # noqa: S311  (rows, not secrets)


def _is_telling(rows: Rows) -> bool:
    """Return whether a result has a value other than NULL and 0. Many queries return NULL or 0 if no row matches."""
    return any(cell is not None and cell != 0 for row in rows for cell in row)


def _same(left: Rows, right: Rows, ordered: bool) -> bool:
    """Return whether two results have the same rows. If ``ordered``, the order of the rows must be the same too."""
    plain_left, plain_right = [_plain(row) for row in left], [_plain(row) for row in right]
    return plain_left == plain_right if ordered else Counter(plain_left) == Counter(plain_right)


def _plain(row: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Return the row with its floats rounded to ten significant digits, because the last digits of a sum depend on the
    order of addition."""
    return tuple(float(f"{cell:.10g}") if isinstance(cell, float) else cell for cell in row)
