"""The SQL grader accepts queries that return the same rows, rejects mutated queries, and survives hostile queries."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.evaluation.graders.sql import grade
from finetune_trainer.evaluation.graders.sql_sandbox import QueryFailed, Sandbox
from finetune_trainer.evaluation.graders.sql_text import Condition, expansions, row_requirements, statements
from tests.trainer.grading import left_out

DATA = Path(os.environ.get("FINETUNE_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "sql"
EVERY = 40
"""Only every 40th of the published rows is graded, because grading all rows takes half a minute."""
BOATS = "CREATE TABLE boat (id INTEGER PRIMARY KEY, name VARCHAR, harbour VARCHAR, length INTEGER)"
CREWS = f"{BOATS}; CREATE TABLE sailor (name VARCHAR, boat_id INTEGER, age INTEGER);"
OWN_ROWS = [
    (BOATS, "SELECT name FROM boat WHERE harbour = 'Old Quay'"),
    (BOATS, "SELECT COUNT(name) FROM boat WHERE harbour = 'Old Quay' AND length > 12"),
    ("CREATE TABLE t (won VARCHAR, year VARCHAR)", "SELECT AVG(won) FROM t WHERE year = '1950'"),
    ("CREATE TABLE t (won VARCHAR, year VARCHAR)", "SELECT SUM(won) FROM t WHERE year < 1950"),
    ("CREATE TABLE t (a, b)", "SELECT a FROM t WHERE b = 5"),
    (BOATS, "SELECT name FROM boat WHERE length = 'nan' AND harbour <> '1_0'"),
    ('CREATE TABLE t (a VARCHAR, "from" VARCHAR)', "SELECT a FROM t WHERE \"from\" = 'here'"),
    ("CREATE TABLE t (a INTEGER, b INTEGER AS (a + 1))", "SELECT b FROM t"),
    ("CREATE TABLE t (a INTEGER CHECK (a > 0), b REAL)", "SELECT a FROM t WHERE b > 0.5"),
    (BOATS, "SELECT name FROM boat WHERE length BETWEEN 10 AND 14 ORDER BY length DESC LIMIT 3"),
    (BOATS, "SELECT harbour FROM boat GROUP BY harbour HAVING COUNT(*) > 2"),
    (BOATS, "SELECT harbour FROM boat GROUP BY harbour ORDER BY COUNT(*) DESC LIMIT 1"),
    (BOATS, 'SELECT name FROM boat WHERE harbour LIKE "%quay%"'),
    (BOATS, "SELECT harbour FROM boat WHERE name = 'Tern' INTERSECT SELECT harbour FROM boat WHERE name = 'Gull'"),
    (CREWS, "SELECT T1.name FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id WHERE T2.name = 'Tern'"),
    (CREWS, "SELECT name FROM boat WHERE NOT id IN (SELECT boat_id FROM sailor)"),
    (CREWS, "SELECT AVG(age) FROM sailor WHERE boat_id IN (SELECT id FROM boat WHERE harbour = 'Old Quay')"),
    (CREWS, "SELECT name FROM sailor WHERE age = (SELECT MAX(age) FROM sailor)"),
]

NESTED = " ".join(["SELECT", "(" * 500, "1", ")" * 500])
LONG = " ".join(["SELECT", "1+" * 20_000, "1"])
LINKS = [f"c{link} AS (SELECT p.x FROM c{link - 1} p, c{link - 1} q)" for link in range(1, 60)]  # noqa: S608
CHAIN = " ".join(["WITH c0 AS (SELECT 1 AS x),", ", ".join(LINKS), "SELECT x FROM c59"])
"""A query with sixty common table expressions.

Each expression after the first one reads the expression before it twice, so sqlite would read the first one 2^59 times.
"""


def right(answer: str, gold: str, context: str = BOATS) -> bool:
    return grade(answer, {"answer": gold, "context": context}).scores["execution"] is True


def published() -> list[dict[str, object]]:
    own: list[dict[str, object]] = [{"context": context, "answer": query} for context, query in OWN_ROWS]
    if not DATA.is_dir():
        return own
    lines = (DATA / "sql-context-dev.jsonl").read_text(encoding="utf-8").splitlines()
    return own + [json.loads(line) for line in lines[::EVERY]]


def test_published_queries_are_right_against_themselves_and_wrong_against_another_one() -> None:
    rows = published()
    for row in rows:
        assert grade(str(row["answer"]), row).scores == {"execution": True}, row
        if str(row["answer"]).count(" WHERE ") == 1:
            other = re.sub(" WHERE (NOT )?", lambda match: " WHERE " if match[1] else " WHERE NOT ", str(row["answer"]))
            assert grade(other, row).scores == {"execution": False}, row


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM boat WHERE length > 12", "select NAME from Boat b where 12 < b.length;"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name AS n FROM boat WHERE length >= 13"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length > 12 ORDER BY name"),
        ("SELECT name FROM boat WHERE harbour = 'Old Quay'", 'SELECT name FROM boat WHERE harbour = "Old Quay"'),
        ("SELECT COUNT(*) FROM boat", "WITH b AS (SELECT * FROM boat) SELECT COUNT(*) FROM b"),
        ("SELECT AVG(length) FROM boat", "SELECT SUM(length) * 1.0 / COUNT(*) FROM boat"),
        ("SELECT name FROM boat ORDER BY length DESC LIMIT 1", "SELECT name FROM boat ORDER BY -length LIMIT 1 -- top"),
    ],
)
def test_another_query_with_the_same_meaning_is_right(gold: str, answer: str) -> None:
    assert right(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("SELECT name FROM boat ORDER BY length", "SELECT name FROM boat"),
        ("SELECT name FROM boat ORDER BY length", "SELECT name FROM boat ORDER BY length DESC"),
        ("SELECT name FROM boat ORDER BY length", "SELECT name FROM boat ORDER BY name"),
        ("SELECT DISTINCT harbour FROM boat", "SELECT harbour FROM boat"),
        ("SELECT harbour FROM boat", "SELECT DISTINCT harbour FROM boat"),
        ("SELECT harbour FROM boat WHERE length > 5", "SELECT DISTINCT harbour FROM boat WHERE length > 5"),
        ("SELECT COUNT(DISTINCT harbour) FROM boat", "SELECT COUNT(harbour) FROM boat"),
        ("SELECT name FROM boat ORDER BY length LIMIT 3", "SELECT name FROM boat ORDER BY length LIMIT 4"),
        ("SELECT name FROM boat ORDER BY length LIMIT 3", "SELECT name FROM boat ORDER BY length LIMIT 2"),
        ("SELECT name FROM boat ORDER BY length LIMIT 30", "SELECT name FROM boat ORDER BY length"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length > 12 LIMIT 1"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT harbour FROM boat WHERE length > 12"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name, harbour FROM boat WHERE length > 12"),
        ("SELECT name, harbour FROM boat", "SELECT harbour, name FROM boat"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length >= 12"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length > 13"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length < 12"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat"),
        ("SELECT name FROM boat WHERE length <= 12", "SELECT name FROM boat WHERE length < 12"),
        ("SELECT MAX(length) FROM boat WHERE id > 12", "SELECT MAX(length) FROM boat WHERE id >= 12"),
        ("SELECT MIN(length) FROM boat WHERE id <= 12 AND name = 'a'", "SELECT MIN(length) FROM boat WHERE name = 'a'"),
        ("SELECT name FROM boat WHERE harbour = 'Old Quay'", "SELECT name FROM boat WHERE harbour = 'old quay'"),
        ("SELECT name FROM boat WHERE harbour = 'Old Quay'", "SELECT name FROM boat WHERE harbour LIKE 'old quay'"),
        ("SELECT name FROM boat WHERE harbour = 'Old Quay'", "SELECT name FROM boat WHERE harbour = 'Old Key'"),
        ("SELECT name FROM boat WHERE harbour = 'Old Quay'", "SELECT name FROM boat WHERE name = 'Old Quay'"),
        ("SELECT MAX(length) FROM boat", "SELECT MIN(length) FROM boat"),
        ("SELECT MAX(length) FROM boat WHERE harbour = 'Old Quay'", "SELECT MAX(length) FROM boat"),
        ("SELECT COUNT(*) FROM boat WHERE harbour = 'Old Quay'", "SELECT COUNT(*) FROM boat WHERE harbour = 'x'"),
        ("SELECT COUNT(*) FROM boat WHERE harbour = 'a' AND length = 5", "SELECT COUNT(*) FROM boat WHERE length = 5"),
        (
            "SELECT COUNT(*) FROM boat WHERE harbour = 'a' AND length = 5",
            "SELECT COUNT(*) FROM boat WHERE harbour = 'a'",
        ),
        (
            "SELECT name FROM boat WHERE harbour = 'a' OR length = 5",
            "SELECT name FROM boat WHERE harbour = 'a' AND length = 5",
        ),
        ("SELECT name FROM boat WHERE length > 12", ""),
        ("SELECT name FROM boat WHERE length > 12", "SELECT"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boats WHERE length > 12"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length > 12; SELECT 1"),
        ("SELECT name FROM boat WHERE length > 12", "The query is SELECT name FROM boat WHERE length > 12"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name FROM boat WHERE length > ?"),
        ("SELECT name FROM boat WHERE length > 12", "SELECT name\x00 FROM boat \ud800"),
    ],
)
def test_each_mutation_of_a_query_is_wrong(gold: str, answer: str) -> None:
    assert right(gold, gold)
    assert not right(answer, gold)


@pytest.mark.parametrize(
    ("gold", "mutants"),
    [
        (
            "SELECT T1.name FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id WHERE T2.name = 'Tern'",
            [
                "SELECT T2.name FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id WHERE T2.name = 'Tern'",
                "SELECT T1.name FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id",
                "SELECT name FROM sailor",
            ],
        ),
        (
            "SELECT T2.name, COUNT(*) FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id GROUP BY T2.id",
            [
                "SELECT T2.name, COUNT(*) FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id GROUP BY T2.name",
                "SELECT name, COUNT(*) FROM boat GROUP BY id",
            ],
        ),
        (
            "SELECT harbour FROM boat GROUP BY harbour HAVING COUNT(*) > 2",
            [
                "SELECT harbour FROM boat GROUP BY harbour HAVING COUNT(*) > 3",
                "SELECT harbour FROM boat GROUP BY harbour HAVING COUNT(*) >= 2",
                "SELECT harbour FROM boat GROUP BY harbour",
            ],
        ),
        (
            "SELECT harbour FROM boat GROUP BY harbour ORDER BY COUNT(*) DESC LIMIT 1",
            ["SELECT harbour FROM boat GROUP BY harbour ORDER BY COUNT(*) LIMIT 1"],
        ),
        (
            "SELECT name FROM boat WHERE NOT id IN (SELECT boat_id FROM sailor)",
            ["SELECT name FROM boat WHERE id IN (SELECT boat_id FROM sailor)", "SELECT name FROM boat"],
        ),
        (
            "SELECT harbour FROM boat WHERE name = 'Tern' INTERSECT SELECT harbour FROM boat WHERE name = 'Gull'",
            [
                "SELECT harbour FROM boat WHERE name = 'Tern' UNION SELECT harbour FROM boat WHERE name = 'Gull'",
                "SELECT DISTINCT harbour FROM boat WHERE name = 'Tern'",
            ],
        ),
        (
            "SELECT name FROM boat WHERE length BETWEEN 10 AND 14 ORDER BY length DESC LIMIT 3",
            [
                "SELECT name FROM boat WHERE length BETWEEN 10 AND 15 ORDER BY length DESC LIMIT 3",
                "SELECT name FROM boat WHERE length > 10 AND length < 14 ORDER BY length DESC LIMIT 3",
            ],
        ),
        (
            "SELECT name FROM sailor WHERE age = (SELECT MAX(age) FROM sailor)",
            [
                "SELECT name FROM sailor WHERE age = (SELECT MIN(age) FROM sailor)",
                "SELECT name FROM sailor ORDER BY age DESC LIMIT 1",
            ],
        ),
        (
            "SELECT name FROM boat ORDER BY harbour, length DESC",
            ["SELECT name FROM boat ORDER BY harbour", "SELECT name FROM boat ORDER BY length DESC, harbour"],
        ),
    ],
)
def test_mutations_of_joins_groups_and_subqueries_are_wrong(gold: str, mutants: list[str]) -> None:
    assert right(gold, gold, CREWS)
    for mutant in mutants:
        assert not right(mutant, gold, CREWS), mutant


def test_two_empty_results_are_no_success() -> None:
    never = "SELECT name FROM boat WHERE length > 3 AND length < 2"
    row = {"context": BOATS, "answer": never}
    assert not grade(never, row).is_graded
    assert not grade("SELECT name FROM boat WHERE 0", row).is_graded
    assert not right("SELECT name FROM boat WHERE 0", "SELECT name FROM boat WHERE harbour = 'a' AND length = 31415")


def test_a_gold_query_without_a_definite_result_is_ungradable() -> None:
    for query in ("SELECT id FROM boat LIMIT 2", "SELECT harbour FROM boat ORDER BY RANDOM()"):
        assert not grade(query, {"context": BOATS, "answer": query}).is_graded


@pytest.mark.parametrize(
    ("context", "query"),
    [
        (BOATS, "SELECT beam FROM boat"),
        (BOATS, "SELEC name FROM boat"),
        (BOATS, "DROP TABLE boat"),
        ("", "SELECT 1"),
        ("CREATE TABLE boat (name", "SELECT name FROM boat"),
        ("CREATE VIEW v AS SELECT 1 AS x", "SELECT x FROM v"),
        (f"{BOATS}; ATTACH 'x.db' AS y", "SELECT name FROM boat"),
        (f"{BOATS}; {BOATS}", "SELECT name FROM boat"),
        (BOATS, "SELECT name FROM boat WHERE id = 'abc'"),
        ("CREATE TABLE t (a \ud800)", "SELECT a FROM t"),
    ],
)
def test_a_gold_row_that_sqlite_refuses_is_counted_apart_neither_right_nor_wrong(context: str, query: str) -> None:
    grades = [grade(query, {"context": context, "answer": query}), grade("SELECT 1", {})]
    assert left_out(grades).total() == 2


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO boat VALUES (1, 'a', 'b', 2)",
        "WITH x AS (SELECT 1) DELETE FROM boat",
        "WITH x AS (SELECT 1) INSERT INTO boat (name) SELECT 'a' FROM x RETURNING *",
        "DROP TABLE boat",
        "PRAGMA writable_schema = 1",
        "ATTACH DATABASE 'stolen.db' AS other",
        "VACUUM INTO 'stolen.db'",
        "SELECT load_extension('libc')",
        "SELECT * FROM pragma_database_list",
        "SELECT readfile('/etc/hostname')",
        "SELECT writefile('stolen.db', 'x')",
        "SELECT RANDOM()",
        "SELECT hex(zeroblob(100000000))",
        "EXPLAIN SELECT 1",
        "BEGIN",
        "",
        "SELECT 1 -- " + "x" * 10_000,
        NESTED,
        LONG,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "SELECT COUNT(*) FROM boat a, boat b, boat c, boat d, boat e, boat f, boat g, boat h",
        "SELECT hex(zeroblob(1500)) || a.name FROM boat a, boat b, boat c, boat d, boat e, boat f ORDER BY 1",
        CHAIN,
    ],
)
def test_a_hostile_query_fails_soon_and_changes_nothing(
    query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Sandbox(BOATS) as sandbox:
        sandbox.insert("boat", [(number, "a", "b", number) for number in range(12)])
        before = sandbox.run("SELECT * FROM boat")
        started = time.thread_time()
        with pytest.raises(QueryFailed):
            sandbox.run(query)
        assert time.thread_time() - started < 2
        assert sandbox.run("SELECT * FROM boat") == before
    assert list(tmp_path.iterdir()) == []


def test_common_table_expressions_are_bounded_by_their_copies_not_by_their_number() -> None:
    assert expansions("SELECT a AS b FROM t") == 1
    assert expansions("WITH x AS (SELECT 1), y(a, b) AS NOT MATERIALIZED (SELECT 1, 2 FROM X) SELECT * FROM y") == 4
    assert expansions('WITH x AS (SELECT 1) SELECT CAST(a AS INT) FROM x AS p, "X" AS q') == 3


def test_what_a_query_demands_of_rows_is_read_from_its_text() -> None:
    query = (
        'SELECT T1.name FROM sailor AS T1 JOIN boat AS T2 ON T1.boat_id = T2.id WHERE T2.harbour = "Old \'Quay"'
        " AND 5 < age AND length BETWEEN -1 AND 2.5 AND T1.name NOT IN ('a', 'it''s') ORDER BY T1.age LIMIT 5 OFFSET 2"
    )
    found = row_requirements(query, {"name", "boat_id", "id", "harbour", "age", "length"})
    assert found.conditions == {
        "harbour": [Condition("=", "Old 'Quay")],
        "age": [Condition(">", 5)],
        "length": [Condition(">=", -1), Condition("<=", 2.5)],
        "name": [Condition("!=", "a"), Condition("!=", "it's")],
    }
    assert (found.joined, found.sorted_by) == ([("boat_id", "id")], {"age"})
    assert (found.rows, found.ordered) == (7, True)
    assert not row_requirements("SELECT name FROM (SELECT name FROM boat ORDER BY id LIMIT 1)", {"name", "id"}).ordered
    assert statements("CREATE TABLE a (b DEFAULT ';');; CREATE TABLE c (d)") == [
        "CREATE TABLE a (b DEFAULT ';')",
        "CREATE TABLE c (d)",
    ]


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=12).filter(lambda text: "\x00" not in text and text.isprintable()), st.data())
def test_a_changed_literal_is_always_noticed(literal: str, data: st.DataObject) -> None:
    other = data.draw(st.text(max_size=12).filter(lambda text: text != literal and text.isprintable()))
    query = "SELECT name FROM boat WHERE harbour = '{}'"
    gold, changed = (query.format(text.replace("'", "''")) for text in (literal, other))
    assert right(gold, gold)
    assert not right(changed, gold)


@settings(max_examples=30)
@given(st.text("SELECT name*FROM boat('\"`[;-/)WITH", max_size=40))
def test_no_text_makes_the_grader_fail(answer: str) -> None:
    assert grade(answer, {"context": BOATS, "answer": "SELECT name FROM boat"}).is_graded
