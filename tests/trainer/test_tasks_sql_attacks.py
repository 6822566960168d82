"""Statements of a model or a data set that would take seconds or gigabytes end with a grade or a problem."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.evaluation.graders import Grade, sql
from finetune_trainer.evaluation.graders.sql import GRADE_SECONDS, PROBLEM, Judge

BOATS = "CREATE TABLE boat (id INTEGER, name TEXT, length REAL)"
GOLD = "SELECT name FROM boat"
SECONDS = 5 * GRADE_SECONDS
"""Bound in seconds for one grade and the start of a child process. On an idle machine both together take at most little
more than GRADE_SECONDS. The bound also holds on a busy machine."""
MEMORY_MIB = 512
ANSWERS = (
    "SELECT printf('%.*c',900000000,'x')",
    "SELECT format('%.*c',900000000,'x')",
    "SELECT length(printf('%900000000d', 1))",
    "SELECT max(hex(zeroblob(400000000)))",
    "SELECT replace(hex(zeroblob(1900)), '0', hex(zeroblob(1900)))",
    "SELECT name FROM boat WHERE hex(zeroblob(1900)) LIKE '%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%0%1'",
)
EXPRESSIONS = (
    "length(printf('%.*c',900000000,'x')) > 0",
    "length(hex(zeroblob(400000000))) > 0",
    "length(replace(hex(zeroblob(5000)), '0', hex(zeroblob(5000)))) > 0",
)
TABLES = (
    "CREATE TABLE boat (name TEXT CHECK ({}))",
    "CREATE TABLE boat (name TEXT, big TEXT AS ({}) STORED)",
    "CREATE TABLE boat (name TEXT, big TEXT AS ({}) VIRTUAL)",
    "CREATE TABLE boat (name TEXT, big TEXT DEFAULT ({}))",
    "CREATE TABLE boat AS SELECT {} AS name",
    "CREATE TABLE boat AS SELECT hex(zeroblob(400000000)) AS name, {} AS big",
)


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


def timed(judge: Judge, answer: str, context: str = BOATS, gold: str = GOLD) -> Grade:
    begun = time.monotonic()
    grade = judge.grade(answer, context, gold)
    assert time.monotonic() - begun < SECONDS
    return grade


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_works_without_end_is_wrong(answer: str, judge: Judge) -> None:
    assert timed(judge, answer).scores == {"execution": False}
    assert judge.grade(GOLD, BOATS, GOLD).scores == {"execution": True}, "the next answer is graded as ever"


@pytest.mark.parametrize("table", TABLES)
def test_tables_that_work_without_end_leave_their_row_out_or_are_graded(table: str, judge: Judge) -> None:
    for expression in EXPRESSIONS:
        grade = timed(judge, GOLD, table.format(expression))
        assert grade.is_graded or grade.problem.startswith("the gold "), grade


def test_a_huge_answer_is_too_long_and_a_huge_row_is_left_out_at_once(judge: Judge) -> None:
    huge = "SELECT " + "1," * 20_000_000 + "1"
    assert timed(judge, GOLD).scores == {"execution": True}
    child = judge.process_id
    assert timed(judge, huge).problem == "the query is too long"
    assert timed(judge, GOLD, BOATS + "/*" + "x" * 20_000_000).problem == "the gold row is too long"
    assert timed(judge, GOLD, BOATS, huge).problem == "the gold row is too long"
    assert timed(judge, GOLD, BOATS, f"{GOLD} LIMIT {'9' * 5000}").problem == "the gold row fails in sqlite"
    assert judge.process_id == child, "nobody had to end the child"


def test_who_ended_the_child_decides_whether_the_answer_is_wrong_or_the_row_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that hangs takes the place of the child process. In the first case it hangs before it reports that the
    reference query is done, in the second case after this report."""
    for stopped_by, expected in (
        ("reference", Grade.left_out(f"the gold row {PROBLEM}")),
        ("answer", Grade(scores={"execution": False}, problem=f"the query {PROBLEM}")),
    ):
        program = f"print('\"ready\"'); {stopped_by == 'answer'} and print('\"reference done\"'); input(); input()"
        monkeypatch.setattr(sql, "COMMAND", [sys.executable, "-u", "-c", program])
        stopped = Judge(seconds=1.0)
        assert stopped.grade(GOLD, BOATS, GOLD) == expected
        stopped.close()


def test_a_child_that_somebody_killed_between_two_answers_is_replaced(judge: Judge) -> None:
    assert judge.grade(GOLD, BOATS, GOLD).scores == {"execution": True}
    assert judge.process_id is not None
    os.kill(judge.process_id, signal.SIGKILL)
    os.waitid(os.P_PID, judge.process_id, os.WEXITED | os.WNOWAIT)
    assert judge.grade(GOLD, BOATS, GOLD).scores == {"execution": True}


def fuzzed(seed: int, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.trainer.sql_fuzz", str(seed), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    return found


def test_drawn_statements_end_in_time_and_memory() -> None:
    found = fuzzed(seed=1, count=300)
    assert found["seconds"] < SECONDS, found
    assert found["memory"] < MEMORY_MIB, found


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_drawn_statements_end_in_time_and_memory(seed: int) -> None:
    found = fuzzed(seed=100 + seed, count=1000)
    assert found["seconds"] < SECONDS, found
    assert found["memory"] < MEMORY_MIB, found
