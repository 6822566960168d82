"""Runs queries of a model or a data set, in an sqlite database in memory. A query can read the tables of its row and do
nothing else: it can't write, attach files, load extensions, run without end or fill the memory.

`sql_judge.py` creates a `Sandbox` from CREATE TABLE statements, inserts rows and runs queries. The main limit counts
sqlite's instructions, so that a grade does not depend on how busy the machine is. A limit in seconds is the last
resort. Neither limit is checked inside of an instruction, so `sql.py` runs the sandbox in a process whose time and
memory are limited.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from types import TracebackType
from typing import NamedTuple

from finetune_trainer.evaluation.graders.sql_text import Kind, Value, expansions, statements, tokens

MAX_ROWS = 1000
MAX_INSTRUCTIONS = 400_000
"""Largest number of instructions of sqlite's virtual machine that one statement may execute, or that all inserts into a
table may execute together: a hundred times what a join of three tables takes.
"""
MAX_SECONDS = 5.0
MAX_TABLES = 20
_HANDLER_EVERY = 1000
"""sqlite checks the limits on instructions and seconds each time it has executed this many instructions."""
_MAX_EXPANSIONS = 5000
"""Largest number of copies of common table expressions that a query may cause (see `sql_text.expansions`)."""
_MAX_VALUE_BYTES = 4000
"""Largest size of a value or a row in bytes. Together with the limit on instructions, it bounds the memory of a
sort.
"""
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 50_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_MAX_SCHEMA_BYTES = 12_000
"""Largest size of a value in bytes until the first query runs. While sqlite creates a table, it stores the text of the
CREATE TABLE statement as a value."""
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_CREATING = frozenset({sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}) | {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_REINDEX,
}
_REFUSED_FUNCTIONS = frozenset({"load_extension", "random", "randomblob", "fts3_tokenizer", "printf", "format"})
"""Functions that a query must not call, because they load code, return another result at every call, or take seconds
for a single instruction, within which the limits are not checked."""

Cell = int | float | str | bytes | None


class QueryFailed(Exception):  # noqa: N818  (what happened to a query, not an error of ours)
    """A query or a CREATE TABLE statement was refused or failed. There are only a few different messages, so that equal
    problems can be counted."""


class Affinity(Enum):
    """The type to which a column converts the values that are stored in the column. sqlite calls this type the column's
    affinity (sqlite.org/datatype3.html, section 3)."""

    NUMBER = "INTEGER, REAL or NUMERIC"
    TEXT = "TEXT"
    NONE = "BLOB"


class Column(NamedTuple):
    """A column of a table, with sqlite's reading of its declaration."""

    name: str
    affinity: Affinity
    key: bool
    """Whether this column is the table's whole primary key."""


class Sandbox:
    """A database in memory with the tables of one row of the evaluation set. Leaving the `with` block closes the
    database."""

    def __init__(self, create_tables: str) -> None:
        """Create the tables. Raise QueryFailed if ``create_tables`` has anything but CREATE TABLE statements, none or
        more than MAX_TABLES of them, or if one is too long or refused by sqlite."""
        self._connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        for limit, value in _LIMITS.items():
            self._connection.setlimit(limit, value)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_SCHEMA_BYTES)
        self._allowed: frozenset[int] = _CREATING
        self._connection.set_authorizer(self._authorize)
        try:
            self._own("PRAGMA temp_store = MEMORY")
            self._create(create_tables)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def tables(self) -> Mapping[str, tuple[Column, ...]]:
        """Return the columns of each table by the table's name, in the order in which the tables were created."""
        names = [str(row[0]) for row in self._own("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
        return {name: tuple(self._columns(name)) for name in names if not name.startswith("sqlite_")}

    def insert(self, table: str, rows: Sequence[Sequence[Value]]) -> None:
        """Insert ``rows``, which have a value for each column. Rows that sqlite refuses are left out. Raise QueryFailed
        if expressions of the table, such as CHECK and generated columns, exceed a limit."""
        if rows:
            name = table.replace('"', '""')
            places = ", ".join("?" * len(rows[0]))
            statement = f'INSERT OR IGNORE INTO "{name}" VALUES ({places})'  # noqa: S608  (quoted above)
            self._connection.set_authorizer(None)
            with self._limited() as spent:
                self._connection.execute("BEGIN")
                for row in rows:
                    with suppress(sqlite3.Error):
                        self._connection.execute(statement, row)
                    if spent():
                        raise QueryFailed("takes too long")
            self._connection.execute("COMMIT")
            self._connection.set_authorizer(self._authorize)

    def run(self, query: str, *, reverse: bool = False) -> list[tuple[Cell, ...]]:
        """Run ``query`` and return its rows. Raise QueryFailed if it is not a single query (SELECT, WITH or VALUES),
        fails, or exceeds a limit.

        With ``reverse`` sqlite visits rows in the opposite order, except where the query orders them. If the result is
        then different, it depends on chance (sqlite.org/pragma.html#pragma_reverse_unordered_selects).
        """
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        self._own(f"PRAGMA reverse_unordered_selects = {int(reverse)}")
        self._allowed = _READING
        first = next(iter(tokens(query[:1000])), None)
        if first is None or first.kind is not Kind.WORD or first.text not in {"select", "with", "values"}:
            raise QueryFailed("is not a SELECT")
        return self._bounded(query)

    def _create(self, create_tables: str) -> None:
        """Run the CREATE TABLE statements. Raise QueryFailed as `__init__` does."""
        parts = statements(create_tables)
        if not parts or len(parts) > MAX_TABLES:
            raise QueryFailed(f"must have 1 to {MAX_TABLES} CREATE TABLE statements")
        for part in parts:
            if [token.text for token in tokens(part)[:2]] != ["create", "table"]:
                raise QueryFailed("is not a CREATE TABLE statement")
            self._bounded(part)

    def _bounded(self, statement: str) -> list[tuple[Cell, ...]]:
        """Run a statement that comes from the model or the data set, and return its rows. Raise QueryFailed if it fails
        or exceeds a limit."""
        if len(statement) > _LIMITS[sqlite3.SQLITE_LIMIT_SQL_LENGTH]:
            raise QueryFailed("is too long")
        if expansions(statement) > _MAX_EXPANSIONS:
            raise QueryFailed("nests too many common table expressions")
        try:
            with self._limited():
                cursor = self._connection.execute(statement)
                rows: list[tuple[Cell, ...]] = cursor.fetchmany(MAX_ROWS + 1)
                cursor.close()
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise QueryFailed("takes too long" if "interrupted" in str(error) else "fails in sqlite") from error
        if len(rows) > MAX_ROWS:
            raise QueryFailed(f"returns more than {MAX_ROWS} rows")
        return rows

    @contextmanager
    def _limited(self) -> Iterator[Callable[[], bool]]:
        """Inside the block, let sqlite interrupt statements that together execute more than MAX_INSTRUCTIONS, or run
        for longer than MAX_SECONDS. Yield a function that returns whether one of these limits was exceeded."""
        calls = 0
        deadline = time.monotonic() + MAX_SECONDS

        def spent() -> bool:
            return calls * _HANDLER_EVERY > MAX_INSTRUCTIONS or time.monotonic() > deadline

        def handler() -> bool:
            nonlocal calls
            calls += 1
            return spent()

        self._connection.set_progress_handler(handler, _HANDLER_EVERY)
        try:
            yield spent
        finally:
            self._connection.set_progress_handler(None, 0)

    def _own(self, statement: str) -> list[tuple[Cell, ...]]:
        """Run a statement that this class itself wrote, and return its rows. The authorizer is off meanwhile, because
        it would refuse the statement."""
        self._connection.set_authorizer(None)
        try:
            return self._connection.execute(statement).fetchall()
        finally:
            self._connection.set_authorizer(self._authorize)

    def _columns(self, table: str) -> list[Column]:
        name = table.replace('"', '""')
        rows = self._own(f'PRAGMA table_info("{name}")')
        keys = [row[1] for row in rows if row[5]]
        return [Column(str(row[1]), _affinity(str(row[2])), [row[1]] == keys) for row in rows]

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """sqlite calls this authorizer for each action of a statement. Return SQLITE_OK to allow it, or SQLITE_DENY.
        The actions are listed at sqlite.org/c3ref/c_alter_table.html."""
        refused = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _REFUSED_FUNCTIONS
        return sqlite3.SQLITE_OK if action in self._allowed and not refused else sqlite3.SQLITE_DENY


def _affinity(declared: str) -> Affinity:
    """Return the affinity of a column with the declared type ``declared`` (sqlite.org/datatype3.html, 3.1)."""
    upper = declared.upper()
    if "INT" in upper:
        return Affinity.NUMBER
    if any(part in upper for part in ("CHAR", "CLOB", "TEXT")):
        return Affinity.TEXT
    return Affinity.NONE if "BLOB" in upper or not upper else Affinity.NUMBER
