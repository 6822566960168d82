"""The GSM8K grader compares the numbers after ####, however the numbers are written."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.tasks import GSM8K
from finetune_trainer.evaluation.graders.grades import GradeList
from finetune_trainer.evaluation.graders.gsm8k import extract, grade
from tests.trainer.grading import left_out, unreadable

DATA = Path(os.environ.get("FINETUNE_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "gsm8k"
OWN_ROWS = ["3 jars of 4 pears are 3*4=<<3*4=12>>12 pears.\n#### 12", "A loss.\n#### -8", "Much.\n#### 1,575,000"]


def right(answer: str, gold: str) -> bool:
    return grade(answer, {"answer": gold}).scores["exact"] is True


def published() -> list[str]:
    if not DATA.is_dir():
        return OWN_ROWS
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return OWN_ROWS + [json.loads(line)["answer"] for line in lines]


def test_every_published_answer_has_its_number_and_is_right_against_itself() -> None:
    rows = published()
    for row in rows:
        assert extract(row) == Decimal(row.split("####")[1].replace(",", "").strip())
    grades = [grade(row, {"answer": row}) for row in rows]
    summary = GradeList.of(GSM8K, grades)
    assert (summary.graded, summary.reported(GSM8K)["exact"], unreadable(grades)) == (len(rows), 1.0, {})


@pytest.mark.parametrize(
    "answer",
    [
        "#### 1000",
        "#### 1,000",
        "#### 1 000",
        "####1000",
        "####   1000  ",
        "#### $1000.",
        "#### $1,000.00",
        "#### \\$1000",
        "#### +1000",
        "#### 01000",
        "#### 1000 pears",
        "#### 1000 pears.\nAnd 7 more lines.",
        "#### 1000. That is it, 5 times 200.",
        "#### 1000%",
        "#### 1000 (5 times 200)",
        "#### 1000km",
        "#### 1000\n2000",
        "200*5 = 1,000\n#### 1000",
        "#### 1000\n#### 7",
        "#### is the marker.\n#### 1000",
        "####\n1000",
        "####\n\n  1000 pears",
        "#### **1000**",
        "#### **1,000** pears",
        "**#### 1000**",
        "#### `1000`",
        "#### \\boxed{1000}",
        "#### $\\boxed{1{,}000}$",
        "#### \\(1000\\)",
        "#### \\[1000\\]",
        "#### \\text{1000 pears}",
        "#### USD 1000",
        "#### US$1,000",
        "#### 1000 USD",
        "####: 1000",
        "#### = 1000",
        "#### 1k",
        "#### 1 thousand pears",
        "#### 0.001 million",
        "#### 1000 m2 of land",
        "#### 1000 = 5 * 200",
        "#### 1000, which is 5 times 200",
        "#### 1000 - that is all",
    ],
)
def test_the_same_number_written_otherwise_is_right(answer: str) -> None:
    assert right(answer, "...\n#### 1,000")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "1000",
        "The answer is 1000",
        "### 1000",
        "##### 1000",
        "####\nThe next problem has 1000 pears.",
        "#### one thousand",
        "#### about 1000",
        "#### 7\n#### 1000",
        "#### 1001",
        "#### 100",
        "#### -1000",
        "#### --1000",
        "#### 1000.5",
        "#### 1,0000",
        "#### 1,000,0",
        "#### 1000e3",
        "#### 1000/2",
        "#### 1000 / 2",
        "#### 1000-1200",
        "#### 1000 * 3",
        "#### 1000 2",
        "#### 1000½",
        "#### 1000:30",
        "#### 1000.0.1",
        "#### ١٠٠٠",
        "#### 1000 million",
        "#### 1000k",
        "#### 1000, 73",
        "#### 1000, and 73",
        "#### 1000 and 73",
        "#### 1000 or 73",
        "#### 1000 hours and 30 minutes",
        "#### 1000 dollars, 30 cents",
        "#### 1000 and a half",
        "#### $1000 to $2000",
        "#### \\boxed{1000}\\boxed{73}",
        "#### 1000**2",
        "#### 1000^2",
        "#### $1000 million",
        "#### 1000 in 2 parts",
    ],
)
def test_another_number_or_no_number_after_the_marker_is_wrong(answer: str) -> None:
    assert not right(answer, "...\n#### 1,000")


def test_a_price_is_its_number() -> None:
    assert right("#### $5.", "#### 5")
    assert right("#### -$5.50", "#### -5.5")
    assert right("#### $-5.50", "#### -5.5")
    assert right("#### .5", "#### 0.50")
    assert right("#### \u20135.50", "#### -5.5")
    assert right("#### \u2212$5.50", "#### -5.5")
    assert right("#### minus 5.50", "#### -5.5")
    assert right("#### $2.5M", "#### 2,500,000")
    assert not right("#### $5.", "#### 50")


def test_a_gold_row_without_a_number_is_counted_apart_and_a_missing_marker_by_its_reason() -> None:
    grades = [grade("#### 5", {"answer": "5"}), grade("#### 5", {}), grade("5", {"answer": "#### 5"})]
    summary = GradeList.of(GSM8K, grades)
    assert (summary.graded, summary.values) == (1, {"exact": [0.0]})
    assert left_out(grades) == {"the gold row has no number after ####": 2}
    assert unreadable(grades) == {"the answer has no number after ####": 1}


numbers = st.decimals(-(10**9), 10**9, places=2)


@given(numbers, numbers)
def test_exactly_equal_numbers_are_equal_however_they_are_written(one: Decimal, other: Decimal) -> None:
    gold = f"#### {one:,f}"
    assert right(f"#### {one:f}", gold)
    assert right(f"so\n#### $ {one:,f}. Done", gold)
    assert right(f"#### {other:f}", gold) == (one == other)


@given(st.text("#1,.$ -5e/\n"))
def test_no_text_makes_the_grader_fail(answer: str) -> None:
    assert grade(answer, {"answer": "#### 5"}).is_graded
