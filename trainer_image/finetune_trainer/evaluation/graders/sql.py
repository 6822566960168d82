"""SQL: a question about tables is answered by a query, and the query is judged by running it.

The gold row's `context` holds CREATE TABLE statements, its `answer` the gold query. Both queries run on several random
databases made for the gold query (`sql_rows.py`), in a sandbox (`sql_sandbox.py`), and must return the same rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from random import Random
from typing import NamedTuple

from finetune_trainer.evaluation.graders.grades import Grade, graded, ungradable
from finetune_trainer.evaluation.graders.sql_rows import generate
from finetune_trainer.evaluation.graders.sql_sandbox import Cell, QueryFailed, Sandbox
from finetune_trainer.evaluation.graders.sql_text import demands

GOLD_FIELD, CONTEXT_FIELD = "answer", "context"
EXECUTION = "execution"
SCORES = (EXECUTION,)

DATABASES = 5
"""Telling databases per example; a wrong query has to agree by chance on all of them."""
ENOUGH = 2
ATTEMPTS = 20
"""Databases made at most in search of telling ones."""

Rows = list[tuple[Cell, ...]]


class Case(NamedTuple):
    """A database, and what the gold query returns on it."""

    sandbox: Sandbox
    expected: Rows


def grade(answer: str, gold_row: Mapping[str, object]) -> Grade:
    """Return whether ``answer`` returns what the row's gold query returns, on every database made for the row.

    Rows are compared as a multiset, in order only where the gold query orders; columns by place, not by name; numbers
    by value. As in test-suite accuracy (Zhong et al. 2020, Distilled Test Suites), several databases are made to tell
    the gold query from its neighbours. One counts only if the gold query returns something on it, so that
    empty == empty is no success, and if the order in which rows are visited does not change what it returns. A row for
    which ``ENOUGH`` such databases aren't found, or whose tables or query sqlite can't run, is ungradable.
    """
    context, query = str(gold_row.get(CONTEXT_FIELD, "")), str(gold_row.get(GOLD_FIELD, ""))
    with ExitStack() as stack:
        try:
            ordered, cases = _cases(stack, context, query)
        except QueryFailed as error:
            return ungradable(f"the gold row {error}")
        if len(cases) < ENOUGH:
            return ungradable("the gold query returns nothing, or nothing definite, on generated rows")
        try:
            right = all(
                _same(case.sandbox.run(answer, reverse=reverse), case.expected, ordered)
                for case in cases
                for reverse in (False, True)
            )
        except QueryFailed as error:
            return graded(SCORES, problem=f"the query {error}")
        return graded(SCORES, right=[EXECUTION] if right else [])


def _cases(stack: ExitStack, context: str, query: str) -> tuple[bool, list[Case]]:
    """Return whether the gold query orders, and telling databases for it."""
    cases: list[Case] = []
    ordered = False
    nothing: Rows | None = None
    for random in _seeds(context, query):
        sandbox = stack.enter_context(Sandbox(context))
        tables = sandbox.tables()
        wanted = demands(query, {column.name.lower() for columns in tables.values() for column in columns})
        ordered = wanted.ordered
        nothing = sandbox.run(query) if nothing is None else nothing
        for table, rows in generate(tables, wanted, random).items():
            sandbox.insert(table, rows)
        expected = sandbox.run(query)
        if (
            expected != nothing
            and _says_something(expected)
            and _same(sandbox.run(query, reverse=True), expected, ordered)
        ):
            cases.append(Case(sandbox, expected))
            if len(cases) == DATABASES:
                break
    return ordered, cases


def _seeds(context: str, query: str) -> Iterator[Random]:
    """Yield generators that depend on the gold row alone: a grade is the same on every machine, in every order."""
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256(f"{attempt}\n{context}\n{query}".encode(errors="surrogatepass")).digest()
        yield Random(digest)  # noqa: S311  (rows, not secrets)


def _says_something(rows: Rows) -> bool:
    """Return whether there is more in a result than NULL and zeros, which other queries return for want of rows."""
    return any(cell is not None and cell != 0 for row in rows for cell in row)


def _same(left: Rows, right: Rows, ordered: bool) -> bool:
    plain_left, plain_right = [_plain(row) for row in left], [_plain(row) for row in right]
    return plain_left == plain_right if ordered else Counter(plain_left) == Counter(plain_right)


def _plain(row: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Return a row whose fractions are rounded: sums and averages may differ in the last digit by their order."""
    return tuple(float(f"{cell:.10g}") if isinstance(cell, float) else cell for cell in row)
