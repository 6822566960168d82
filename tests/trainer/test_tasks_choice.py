"""The grader Choice: sentences around the chosen option, answers of several lines, several options in one answer, and
options that are written with LaTeX, a minus sign or their own labels."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from finetune_core.api.task import TaskSpec
from finetune_trainer.evaluation.graders import GRADERS, Grade

TOWNS = ["London", "Paris", "Rome"]


def grade(answer: str, row: Mapping[str, object]) -> Grade:
    return GRADERS["Choice"](TaskSpec(name="Choice"))(answer, row)


@pytest.mark.parametrize(
    ("answer", "own", "right"),
    [
        ("A. wrong. B is right", "A", False),
        ("A. wrong. B is right", "B", False),
        ("A: no, it is B", "A", False),
        ("A. No, the answer is (B).", "A", False),
        ("A) The correct answer is option B", "A", False),
        ("A: no. **B** is the best choice.", "A", False),
        ("A: wait, actually it's B; see above", "A", False),
        ("A. wrong.\nB is right", "A", False),
        ("A\nNo, it is B.", "A", False),
        ("A\nB", "A", False),
        ("A\nor B", "A", False),
        ("A\nB is correct", "A", False),
        ("A or B is correct", "B", False),
        ("It is not B", "B", False),
        ("It isn't B", "B", False),
        ("B is not right", "B", False),
        ("D. Only A is correct", "A", False),
        ("B. something", "B", True),
        ("C. Plan B", "C", True),
        ("D. Only A is correct", "D", True),
        ("D. B is right but C is best of all", "D", True),
        ("A. It is a mammal", "A", True),
        ("A. If it is B, the lamp is on", "A", True),
        ("A. I don't think it is B.", "A", True),
        ("A. Yes. A is right", "A", True),
        ("A: yes, it is A", "A", True),
        ("It is B", "B", True),
        ("It's (B).", "B", True),
        ("It’s option B", "B", True),
        ("B is correct", "B", True),
        ("**B** is the right answer.", "B", True),
        ("Option B is the best choice!", "B", True),
        ("B\n\nBecause of A.", "B", True),
        ("B\r\nA can't be it.", "B", True),
        ("The answer is B\n\nThe others are wrong.", "B", True),
        ("B\n\nSo B is right.", "B", True),
    ],
)
def test_without_texts_an_answer_chooses_one_letter(answer: str, own: str, right: bool) -> None:
    found = grade(answer, {"answer": own})
    assert found.scores == {"exact": right}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is B", True),
        ("It is Paris.", True),
        ("B is correct", True),
        ("B) Paris is the right answer", True),
        ("Paris is correct.", True),
        ("B Paris", True),
        ("B \u2212 Paris", True),
        ("B\n\nBecause London is no town of France.", True),
        ("Paris\nIt lies at the Seine.", True),
        ("B. Paris\n\nB is right.", True),
        ("B London", False),
        ("B A", False),
        ("B is wrong", False),
        ("B) London is correct", False),
        ("A or B is correct", False),
        ("Paris or London is correct", False),
        ("B\nA", False),
        ("B\nA) but not London alone", False),
        ("B\nor London", False),
        ("B\nNo, it is C.", False),
        ("Paris\nRome", False),
        ("A London\nB Paris\nC Rome", False),
        ("B of the two\nParis, I think", False),
    ],
)
def test_with_texts_words_around_an_option_make_no_difference(answer: str, right: bool) -> None:
    for row in ({"answer": "B", "choices": TOWNS}, {"answer": "B", "choices": ["A. London", "B. Paris", "C. Rome"]}):
        assert grade(answer, row).scores == {"exact": right}


@pytest.mark.parametrize(
    "choices", [["$x^2$", "$x^3$"], ["x^2", "x^3"], ["A. $x^2$", "B) $x^3$"], ["\\(x^2\\)", "x^3"]]
)
def test_markup_of_latex_makes_no_difference(choices: list[str]) -> None:
    for answer in ("x^2", "$x^2$", "\\(x^2\\)", "\\boxed{x^2}", "\\boxed{A}", "A) $x^2$", "A x^2", "It is $x^2$."):
        assert grade(answer, {"answer": "A", "choices": choices}).scores == {"exact": True}
        assert grade(answer, {"answer": "B", "choices": choices}).scores == {"exact": False}
    assert grade("B) $x^2$", {"answer": "B", "choices": choices}).scores == {"exact": False}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["-5", "5"], "\u22125", True),
        (["\u22125", "5"], "-5", True),
        (["\u22125", "5"], "A. -5", True),
        (["-5", "5"], "5", False),
        (["A. London", "B. Paris"], "London", True),
        (["A. London", "B. Paris"], "A. London", True),
        (["A. London", "B. Paris"], "A. A. London", True),
        (["(A) London", "(B) Paris"], "london", True),
        (["A. London", "B. Paris"], "Paris", False),
        (["A. London", "Paris"], "London", False),
        (["B. London", "A. Paris"], "B. London", True),
        (["B. London", "A. Paris"], "London", False),
        (["A. B", "B. A"], "A. B", True),
        (["A. B", "B. A"], "A", True),
        (["$x$", "x"], "$x$", True),
        (["$x$", "x"], "x", False),
        (["$B$", "$A$"], "A", True),
        (["$B$", "$A$"], "B", False),
        (["$$", "$y$"], "$$", True),
        (["$$", "$y$"], "y", False),
    ],
)
def test_another_spelling_of_an_option_names_it_where_it_is_clear(choices: list[str], answer: str, right: bool) -> None:
    assert grade(answer, {"answer": "A", "choices": choices}).scores == {"exact": right}


def test_labels_of_digits_are_no_part_of_decimal_numbers() -> None:
    choices = {"label": ["1", "2"], "text": ["1.5", "2.6"]}
    assert grade("1.5", {"answer": "1", "choices": choices}).scores == {"exact": True}
    assert grade("5", {"answer": "1", "choices": choices}).scores == {"exact": False}


def test_the_problem_says_that_an_answer_may_name_several_options() -> None:
    assert grade("A: no, it is B", {"answer": "A"}).problem == "the answer names no option, or several"


@pytest.mark.parametrize(
    "answer",
    ["a. " + "no, " * 70_000, "a. " + "x. " * 70_000, "b" + " is right" * 30_000, "b\n" * 40_000, "a. it is " * 30_000],
    ids=lambda answer: answer[:12],
)
@pytest.mark.parametrize("choices", [None, TOWNS])
def test_the_time_is_in_proportion_to_the_answer(answer: str, choices: list[str] | None) -> None:
    """A linear grader takes about 1 s at most. The bound is larger, because the machine may be busy."""
    began = time.process_time()
    grade(answer, {"answer": "B", "choices": choices})
    assert time.process_time() - began < 10
