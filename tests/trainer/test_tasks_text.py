"""The graders ExactMatch, Contains, Regex, JSON and Choice: right answers however they are written, wrong ones that
look right, rows that can't be used, and hostile texts. Some of the tests cover other graders too."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune_core.api.task import TaskSpec
from finetune_core.errors import UserError
from finetune_core.tasks import TASKS
from finetune_trainer.evaluation.graders import GRADERS, Grade
from finetune_trainer.evaluation.graders.json_value import DEEPEST
from finetune_trainer.evaluation.graders.texts import Normalisation

IGNORABLE = ["Case", "WhiteSpace", "Punctuation", "UnicodeForm"]
SIMPLE = {name: GRADERS[name] for name in TASKS if name != "SQL"}
ARGUMENTS: Mapping[str, dict[str, Any]] = {"Regex": {"pattern": "(?:Answer: )?(.*)"}}

anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=3)
    | st.decimals()
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def grade(name: str, answer: str, row: Mapping[str, object], **arguments: object) -> Grade:
    spec = TaskSpec.model_validate({"name": name, **ARGUMENTS.get(name, {}), **arguments})
    return GRADERS[name](spec)(answer, row)


def right(name: str, answer: str, reference: object, **arguments: object) -> bool | float | None:
    return grade(name, answer, {"answer": reference}, **arguments).scores.get(TASKS[name].main)


@given(st.sampled_from(sorted(SIMPLE)), st.text(st.characters()), anything, anything)
def test_no_answer_and_no_row_makes_a_grader_fail(name: str, answer: str, reference: object, choices: object) -> None:
    found = grade(name, answer, {"answer": reference, "mr": reference, "choices": choices})
    assert found.is_graded or found.problem


@pytest.mark.parametrize("name", sorted(set(SIMPLE) - {"Number"}))
def test_a_row_with_a_number_of_more_digits_than_python_writes_is_left_out(name: str) -> None:
    for value in (10**5000, [10**5000]):
        assert not grade(name, "1", {"answer": value, "mr": value, "choices": [1, value]}).is_graded


# ---- ExactMatch and Contains ----


@given(st.text(st.characters()), st.sets(st.sampled_from(IGNORABLE)))
@example("e.\u0301", {"Punctuation", "UnicodeForm"})
@example("a.-5", {"Punctuation"})
def test_the_form_of_a_form_is_the_same_form(text: str, ignored: set[Any]) -> None:
    normalisation = Normalisation(frozenset(ignored))
    once = normalisation.of(text)
    assert normalisation.of(once) == once


@given(st.text(), st.text(), st.sets(st.sampled_from(IGNORABLE)))
def test_every_text_matches_itself_and_is_contained_in_a_longer_one(text: str, other: str, ignored: set[str]) -> None:
    arguments = {"ignore": sorted(ignored)}
    found = right("ExactMatch", f" {text}\n", text, **arguments)
    assume(found is not None)
    assert found is True
    assert right("Contains", f"{other} \n {text} \n {other}", text, **arguments) is True
    if not ignored and text.strip() != other.strip():
        assert right("ExactMatch", other, text) is False


@pytest.mark.parametrize(
    ("answer", "reference", "ignore", "same"),
    [
        ("PARIS", "Paris", ["Case"], True),
        ("straße", "STRASSE", ["Case"], True),
        ("PARIS", "Paris", [], False),
        ("New  York", "New York", ["WhiteSpace"], True),
        ("New\u00a0York\n", "New York", ["WhiteSpace"], True),
        ("NewYork", "New York", ["WhiteSpace"], False),
        ("Paris.", "Paris", ["Punctuation"], True),
        ("“Paris”!", "Paris", ["Punctuation"], True),
        ("Paris.", "Paris", [], False),
        ("Ｐａｒｉｓ", "Paris", ["UnicodeForm"], True),
        ("ﬁne", "fine", ["UnicodeForm"], True),
        ("Cafe\u0301", "Café", ["UnicodeForm"], True),
        ("Cafe\u0301", "Café", [], False),
        ("3", 3, [], True),
        ("true", True, [], True),
        ("Rome", ["Paris", "Rome"], [], True),
        ("Lyon", ["Paris", "Rome"], [], False),
        ("-5", "5", ["Punctuation"], False),
        ("(-5)", "-5.", ["Punctuation"], True),
        ("35", "3.5", ["Punctuation"], False),
        ("3.5.", "3.5", ["Punctuation"], True),
        ("1,000", "1000", ["Punctuation"], True),
        ("Par\u00adis\u200b", "\ufeffParis", ["UnicodeForm"], True),
        ("1.50", Decimal("1.50"), [], True),
        ("2024-05-01", date(2024, 5, 1), [], True),
        ("1e-07", 1e-07, [], True),
        ("NaN", float("nan"), [], None),
        ("...", "!!!", ["Punctuation"], None),
        ("Paris", "", [], None),
        ("Paris", [], [], None),
        ("Paris", None, [], None),
        ("Paris", {"a": "Paris"}, [], None),
        ("Paris", ["Paris", None], [], None),
    ],
)
def test_an_exact_match_ignores_what_the_job_names(
    answer: str, reference: object, ignore: list[str], same: bool | None
) -> None:
    assert right("ExactMatch", answer, reference, ignore=ignore) is same


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        ("It is Paris, of course.", "Paris", {"contains": True, "found": 1.0}),
        ("Paris and Rome", ["Rome", "Paris"], {"contains": True, "found": 1.0}),
        ("Paris and Lyon", ["Rome", "Paris"], {"contains": False, "found": 0.5}),
        ("It is 172.", "72", {"contains": False, "found": 0.0}),
        ("It is 72.", 72, {"contains": True, "found": 1.0}),
        ("cartoon", "car", {"contains": False, "found": 0.0}),
        ("a car, a cartoon", "car", {"contains": True, "found": 1.0}),
        ("東京都です", "東京", {"contains": True, "found": 1.0}),
        ("c++ is old", "c++", {"contains": True, "found": 1.0}),
        ("It is 3.5.", "5", {"contains": False, "found": 0.0}),
        ("It is 3.5.", "3", {"contains": False, "found": 0.0}),
        ("It is 3.5.", "3.5", {"contains": True, "found": 1.0}),
        ("It is 1,000.", "1", {"contains": False, "found": 0.0}),
        ("1,2,3", "2", {"contains": True, "found": 1.0}),
        ("It is -5.", "5", {"contains": False, "found": 0.0}),
        ("It is -5.", "-5", {"contains": True, "found": 1.0}),
        ("2024-05-01", "05", {"contains": True, "found": 1.0}),
        ("Cafe\u0301s", "Cafe", {"contains": False, "found": 0.0}),
        ("", "Paris", {"contains": False, "found": 0.0}),
        ("Paris", [""], {}),
    ],
)
def test_an_answer_contains_all_texts_and_no_parts_of_longer_words(
    answer: str, reference: object, scores: dict[str, float]
) -> None:
    assert grade("Contains", answer, {"answer": reference}).scores == scores


@pytest.mark.parametrize(
    ("name", "answer", "reference"),
    [
        ("Contains", "a" * 300_000, "a" * 100_000),
        ("Contains", "ax " * 100_000, "ax " * 40_000 + "a"),
        ("JSON", "```\n" + " " * 300_000 + "x", "1"),
        ("JSON", "```json" + "\n" * 300_000 + "x", "1"),
        ("JSON", "`" * 200_000 + "\n" + "`" * 150_000, "1"),
        ("JSON", "~" * 200_000 + "\n" + "~" * 150_000 + "x", "1"),
        ("Choice", "the answer is " * 20_000, "a"),
        ("Choice", "\\boxed{" * 20_000, "a"),
        ("ExactMatch", "a.-" * 100_000, "a"),
        ("ViGGO", "inform(" + "a[ ]," * 60_000, "inform(name[a])"),
    ],
)
def test_the_time_of_a_grader_is_in_proportion_to_the_answer(name: str, answer: str, reference: str) -> None:
    """A linear grader takes less than 0.5 s for each answer. The bound is ten times this time, because the machine may
    be busy."""
    began = time.process_time()
    arguments = {"ignore": IGNORABLE} if name == "ExactMatch" else {}
    grade(name, answer, {"answer": reference, "mr": reference}, **arguments)
    assert time.process_time() - began < 5


# ---- Regex ----


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "scores"),
    [
        ("Answer: *(.)", "so\nAnswer: B", "A or B?\nAnswer: B", {"exact": True, "found": True}),
        ("Answer: *(.)", "Answer:B", "B", {"exact": True, "found": True}),
        ("Answer: *(.)", "Answer: A", "B", {"exact": False, "found": True}),
        ("Answer: *(.)", "B", "B", {"exact": False, "found": False}),
        ("[0-9]{4}-[0-9]{2}", "on 2024-05-01", "2024-05", {"exact": True, "found": True}),
        ("a|(b)", "a", "b", {"exact": False, "found": True}),
        ("(x)?", "y", "x", {"exact": False, "found": True}),
        ("(x)?", "y", "y", {}),
        (".", "a", None, {}),
    ],
)
def test_a_pattern_finds_what_is_compared(
    pattern: str, answer: str, reference: object, scores: dict[str, bool]
) -> None:
    assert grade("Regex", answer, {"answer": reference}, pattern=pattern).scores == scores


@pytest.mark.parametrize("pattern", ["(", "(?<=a)b", r"(a)\1", "a{1001}", "[z-a]", "(((a{100}){100}){100})"])
def test_a_pattern_that_re2_can_not_read_names_its_field(pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"^dataset\.task\.pattern: must be a regular expression in the syntax of RE2: "
    ):
        GRADERS["Regex"](TaskSpec.model_validate({"name": "Regex", "pattern": pattern}))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "((a*)*)*b", "(a?){30}a{30}"])
def test_a_hostile_pattern_takes_linear_time(pattern: str) -> None:
    began = time.process_time()
    grade("Regex", "a" * 100_000 + "!", {"answer": "x"}, pattern=pattern)
    assert time.process_time() - began < 5


@given(st.text(max_size=40), st.text(st.characters()), st.text(st.characters()))
def test_any_pattern_is_refused_or_grades(pattern: str, answer: str, reference: str) -> None:
    assume(pattern)
    try:
        grader = GRADERS["Regex"](TaskSpec.model_validate({"name": "Regex", "pattern": pattern}))
    except UserError:
        return
    grader(answer, {"answer": reference})


# ---- JSON ----

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(values, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_a_value_equals_itself_however_it_is_written(value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(shuffled(value), indent=indent, ensure_ascii=ascii_only)
    fenced = (f"```json\n{text}\n```", f"```\r\n{text}\r\n```", f"```JSON5 title\n{text}```", f"~~~~\n{text}\n~~~~")
    for answer in (text, f" {text}\n", *fenced):
        found = grade("JSON", answer, {"answer": json.dumps(value)}).scores
        assert found == {"equal": True, "keys": 1.0}
    if value is not None and not isinstance(value, str):
        assert right("JSON", text, value) is True


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', {"equal": False, "keys": 0.5}),
        ('{"a": 1}', '{"a": 1, "b": 3}', {"equal": False, "keys": 0.5}),
        ('{"a": 1, "b": 3, "c": 0, "d": 0}', '{"a": 1, "b": 3}', {"equal": False, "keys": 0.5}),
        (
            '{"a": {"x": 1, "y": 2}, "b": 3}',
            '{"a": {"x": 1, "y": 0}, "b": 0}',
            {"equal": False, "keys": pytest.approx(1 / 3)},
        ),
        ("[1, 2]", "[2, 1]", {"equal": False, "keys": 0.0}),
        ("1.0", "1", {"equal": True, "keys": 1.0}),
        ("true", "1", {"equal": False, "keys": 0.0}),
        ('"1"', "1", {"equal": False, "keys": 0.0}),
        ("null", "null", {"equal": True, "keys": 1.0}),
        ("1e999999999", "1", {"equal": False, "keys": 0.0}),
        ("1.5", Decimal("1.50"), {"equal": True, "keys": 1.0}),
        ("", "1", {"equal": False, "keys": 0.0}),
        ("NaN", "1", {"equal": False, "keys": 0.0}),
        ('{"a": 1} and more', '{"a": 1}', {"equal": False, "keys": 0.0}),
        ("1", "nothing", {}),
        ("1", "NaN", {}),
        ("1", None, {}),
        ("[" * 100_000, "1", {"equal": False, "keys": 0.0}),
        ("1", "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), {}),
    ],
    ids=str,
)
def test_values_are_compared_and_not_texts(answer: str, reference: object, scores: dict[str, float]) -> None:
    assert grade("JSON", answer, {"answer": reference}).scores == scores


# ---- Choice ----

TOWNS = ["London", "Paris", "Rome"]


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "B)",
        "[B]",
        "**B**",
        "B\n",
        "Answer: B",
        "The answer is B.",
        "The correct answer is (B)",
        "Paris",
        "paris.",
        "B) Paris",
        "B. Paris",
        "(B) Paris",
        "B: Paris",
        "the answer is Paris",
        "Option B",
        "The correct answer is option B",
        "So the answer is my choice: the answer is option B",
        "I choose B",
        "B - Paris",
        "(B) \u2013 Paris",
        "B, Paris",
        "**B)** Paris",
        "\\boxed{B}",
        "$\\boxed{\\text{B}}$",
        "Answer: \\(B\\)",
        "\uff22\uff09Paris",
    ],
)
def test_an_option_is_named_by_letter_text_or_both(answer: str) -> None:
    lettered = {"A": "London", "B": "Paris", "C": "Rome", "D": None}
    for choices in (
        TOWNS,
        json.dumps(TOWNS),
        {"text": TOWNS, "label": ["A", "B", "C"]},
        lettered,
        json.dumps(lettered),
    ):
        for own in ("B", "Paris", 1, 1.0, Decimal(1), "(B) Paris"):
            assert grade("Choice", answer, {"answer": own, "choices": choices}).scores == {"exact": True}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A",
        "C",
        "D",
        "1",
        "London",
        "A) Paris",
        "B) London",
        "A B",
        "A or B",
        "B and C",
        "A, B",
        "B, C",
        "B - Rome",
        "A big town is Paris",
        "Pari",
    ],
)
def test_another_option_none_or_a_contradiction_is_wrong(answer: str) -> None:
    assert grade("Choice", answer, {"answer": "B", "choices": TOWNS}).scores == {"exact": False}


def test_without_texts_only_letters_count() -> None:
    assert grade("Choice", "(D) whatever it says", {"answer": "D"}).scores == {"exact": True}
    for answer in ("whatever it says", "D, E", "D - not E"):
        assert grade("Choice", answer, {"answer": "D"}).scores == {"exact": False}
    assert grade("Choice", "2", {"answer": "2", "choices": {"text": TOWNS, "label": [1, 2, 3]}}).scores == {
        "exact": True
    }


def test_options_may_have_any_labels_and_consist_of_punctuation() -> None:
    roman = {"answer": "II", "choices": {"label": ["I", "II", "III"], "text": TOWNS}}
    for answer in ("II", "(ii) Paris", "Paris"):
        assert grade("Choice", answer, roman).scores == {"exact": True}
    assert grade("Choice", "III", roman).scores == {"exact": False}
    marks = {"answer": "B", "choices": [",", "!", "?"]}
    for answer, right in {"!": True, "B": True, "": False, "*": False, "?": False}.items():
        assert grade("Choice", answer, marks).scores == {"exact": right}


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "D", "choices": TOWNS},
        {"answer": "A", "choices": ["Paris", "Paris."]},
        {"answer": Decimal("sNaN"), "choices": TOWNS},
        {"answer": 0.5, "choices": TOWNS},
        {"answer": 3, "choices": TOWNS},
        {"answer": True, "choices": TOWNS},
        {"answer": "A", "choices": []},
        {"answer": "A", "choices": "London, Paris"},
        {"answer": "A", "choices": '{"A": "London", "A": "Paris"}'},
        {"answer": "A", "choices": "[" * 5000 + "]" * 5000},
        {"answer": "A", "choices": ["B", "A"]},
        {"answer": "A", "choices": ["Paris", "paris"]},
        {"answer": "A", "choices": {"text": TOWNS, "label": ["A", "B"]}},
        {"answer": None, "choices": TOWNS},
        {"answer": 1},
    ],
)
def test_a_row_whose_options_or_answer_are_not_clear_is_left_out(row: dict[str, object]) -> None:
    assert not grade("Choice", "A", row).is_graded
