"""The page of `finetune compare` shows answers of both models to the same rows, from files of any content."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.compare.answers import MOST_ANSWERS, TEXT_LENGTH, AnsweredRow, pairs_of
from finetune_cli.compare.claims.findings import Comparison
from finetune_cli.compare.compared_run import read_run
from finetune_cli.compare.folders import LocalFolder
from finetune_cli.compare.page_tables import answers_of
from finetune_cli.compare.stored_files import StoredAnswer, StoredScores, parse
from tests.cli.made_comparison import page_of
from tests.cli.written_runs import GOLD, Made, write_run

ROWS = st.lists(st.integers(0, 5), max_size=20)


def stored(row: int, text: str) -> StoredAnswer:
    return StoredAnswer(answer=text, gold={"id": row})


def row_of(pair: AnsweredRow) -> int:
    ((_, text),) = pair.columns
    return int(text)


@given(ROWS, ROWS)
def test_each_answer_is_shown_once_beside_an_answer_to_the_same_row(base: list[int], tuned: list[int]) -> None:
    pairs = pairs_of(
        [stored(row, f"base {index} of {row}") for index, row in enumerate(base)],
        [stored(row, f"tuned {index} of {row}") for index, row in enumerate(tuned)],
    )
    shared = sum(min(base.count(row), tuned.count(row)) for row in set(base))
    both = [pair for pair in pairs if pair.base is not None and pair.tuned is not None]
    assert len(both) == min(shared, MOST_ANSWERS)
    assert list(pairs[: len(both)]) == both
    assert len(pairs) == min(len(base) + len(tuned) - shared, MOST_ANSWERS)
    shown = [answer for pair in pairs for answer in (pair.base, pair.tuned) if answer is not None]
    assert len({answer.text for answer in shown}) == len(shown)
    for pair in pairs:
        assert {answer.text.split()[-1] for answer in (pair.base, pair.tuned) if answer is not None} == {
            str(row_of(pair))
        }


def test_long_texts_are_cut_off() -> None:
    (pair,) = pairs_of([], [StoredAnswer(answer="a" * 10_000, gold={"text": "b" * 10_000, "list": list(range(9999))})])
    assert pair.tuned is not None
    for text in (pair.tuned.text, *(value for _, value in pair.columns)):
        assert len(text) == TEXT_LENGTH + 1
        assert text.endswith("…")


def test_the_answers_of_a_run_are_on_its_page(tmp_path: Path) -> None:
    comparison = Comparison.of([read_run(LocalFolder(write_run(tmp_path / "run", Made())), "lora")])
    (run,) = answers_of(comparison)
    assert [entry["answers"] for entry in run["entries"]] == [
        [{"text": "no idea", "grades": "strict: wrong"}, {"text": gold["mr"], "grades": "strict: right"}]
        for gold in GOLD
    ]
    html = page_of(comparison)
    assert 'href="#answers"' in html
    for gold in GOLD:
        assert gold["mr"] in html


def test_without_answers_the_page_has_no_such_section(tmp_path: Path) -> None:
    comparison = Comparison.of([read_run(LocalFolder(write_run(tmp_path / "run", Made(finished=False))), "lora")])
    assert answers_of(comparison) == []
    assert "#answers" not in page_of(comparison)


def test_answers_that_are_none_do_not_hide_the_scores() -> None:
    found = parse(StoredScores, b'{"evaluation": {}, "baseAnswers": [{"answer": 3}], "tunedAnswers": []}')
    assert found is not None
    assert found.base_answers == ()
