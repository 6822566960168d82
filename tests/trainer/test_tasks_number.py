"""The functions that read the number of an answer read it however it is written, and read no number where one statement
has several. The grader of Number accepts every number within the tolerance."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.task import TaskSpec
from finetune_core.row_templates import text_or_none
from finetune_trainer.evaluation.graders.number import (
    number_grader,
    plain,
    read_number_behind,
    read_only_number,
    read_statement,
)

numbers = st.decimals(-(10**12), 10**12, places=2)
FORMS = st.sampled_from(["{:f}", "{:,f}", "{:+,f}", "{:_f}"]).map(lambda form: form.replace("_f", "f"))
WRAPPERS = st.sampled_from(
    [
        "{}",
        "**{}**",
        "__{}__",
        "*{}*",
        "`{}`",
        '"{}"',
        "“{}”",
        r"\boxed{{{}}}",
        r"$\boxed{{{}}}$",
        r"\({}\)",
        r"\[ {} \]",
        r"\text{{{}}}",
        r"\mathbf{{{}}}",
        "= {}",
        " {} ",
    ]
)
UNITS = st.sampled_from(
    ["", "%", r"\%", " pears", " m2", " km^2", " km/h", " °C", " USD", " dollars", ".", "!", " (so be it)"]
)
REMARKS = st.sampled_from(
    ["", "\n", "\nThe next one: 5 + 6", ". It is 5 times more", ", which is right", " - that is all"]
)
MARKS = st.sampled_from(["-", "\u2212", "\u2013", "\u2010", "minus "])


@given(numbers, FORMS, WRAPPERS, UNITS, REMARKS, MARKS)
def test_a_number_is_read_however_it_is_written(
    number: Decimal, form: str, wrapper: str, unit: str, remark: str, mark: str
) -> None:
    written = wrapper.format(form.format(number).replace("-", mark)) + unit + remark
    for text in (f"#### {written}", f"####\n{written}", f"so\n####{written}", f"#### {written}\n#### 7"):
        assert read_number_behind("####", text) == number, text
    assert read_statement(plain(written).strip()) == number


@given(
    st.decimals(0, 10**6, places=2), st.sampled_from(["$", "\\$", "€", "£", "US$", "USD ", "EUR ", "Rs. ", "$ "]), FORMS
)
def test_a_currency_before_the_number_makes_no_difference(number: Decimal, currency: str, form: str) -> None:
    written = currency + form.format(number).lstrip("+")
    assert read_number_behind("####", f"#### {written}") == number
    assert read_number_behind("####", f"#### -{written}") == -number
    assert read_only_number(f"It costs {written} in all.") == number


@pytest.mark.parametrize(
    ("word", "factor"),
    [
        ("k", 10**3),
        ("K", 10**3),
        ("thousand", 10**3),
        ("million", 10**6),
        ("Million", 10**6),
        ("mn", 10**6),
        ("billion", 10**9),
        ("bn", 10**9),
        ("trillion", 10**12),
        ("hundred", 100),
        ("lakh", 10**5),
        ("crore", 10**7),
        ("dozen", 12),
        ("hundred million", 10**8),
        ("thousand million", 10**9),
    ],
)
@given(number=st.decimals(0, 10**6, places=3))
def test_a_word_behind_the_number_multiplies_it_exactly(word: str, factor: int, number: Decimal) -> None:
    assert read_number_behind("####", f"#### {number:f} {word} people") == number * factor
    assert read_number_behind("####", f"#### ${number:,f} {word}.") == number * factor


JOINTS = st.sampled_from(
    [
        ", ",
        " and ",
        " or ",
        ", and ",
        " to ",
        "-",
        " - ",
        "–",
        "/",
        " / ",
        " + ",
        " * ",
        "x",
        " x ",
        "^",
        "**",
        ":",
        " hours and ",
        " dollars, ",
        " hours ",
        " of ",
        "e",
        " e1 and ",
        ",",
        ".",
        " times ",
        "; and then of ",
    ]
)


@given(st.integers(1, 10**6), JOINTS, st.integers(1, 10**6), st.sampled_from(["#### {}", "#### **{}**", "#### ${}"]))
def test_several_numbers_in_one_statement_are_no_number(one: int, joint: str, other: int, form: str) -> None:
    text = form.format(f"{one}{joint}{other}")
    read = read_number_behind("####", text)
    if joint in (",", "."):  # Both joints can make one number, like `1,234` and `1.5`.
        assert read in (None, Decimal(f"{one}{joint}{other}".replace(",", "")))
    elif joint.startswith(";"):
        assert read == one
    else:
        assert read is None


@given(st.text("#1,.$ -–5e/\n\\boxed{}()*mkand\u00a0½²"))
def test_no_text_makes_the_reader_fail(text: str) -> None:
    for read in (read_number_behind("####", text), read_only_number(text), read_statement(plain(text))):
        assert read is None or read.is_finite()


@pytest.mark.parametrize(
    "text",
    [
        "#" * 200_000,
        "#### " * 40_000,
        "#### a " * 30_000,
        "#### 1" + " " * 200_000 + "x",
        "#### " + "1," * 100_000,
        "#### " + "1 " * 100_000,
        "#### " + "$ " * 100_000,
        "#### " + "- " * 100_000 + "1",
        "#### 1" + " million" * 30_000,
        "#### 1" + " and" * 50_000,
        "#### 1" + ", " * 100_000,
        "#### 1" + "a " * 100_000 + "1",
        ("####" + "{" * 50) * 3000,
        "\\(" * 100_000 + "1",
        "#### " + "12,34," * 60_000,
        "#### 1" + "'000" * 100_000 + "x",
        "#### 1 \u00d7" + " " * 200_000 + "x",
        "a - " * 100_000 + "5",
        "\u221a " * 100_000 + "5",
        "1" * 200_000,
    ],
    ids=lambda text: text[:12],
)
def test_the_time_of_the_reader_is_in_proportion_to_the_text(text: str) -> None:
    """A linear reader takes less than 0.2 s for each text. The bound is far above this time, because the machine may be
    busy. A quadratic reader takes minutes."""
    began = time.process_time()
    read_number_behind("####", text)
    read_only_number(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("The answer is 72.", 72),
        ("The answer is -72", -72),
        ("It is minus 72 degrees", -72),
        ("There are about 3.14 of them (roughly).", Decimal("3.14")),
        ("It costs $2.5M in all.", 2_500_000),
        ("**Result:** \\boxed{72}", 72),
        ("", None),
        ("seventy-two", None),
        ("72 and 73", None),
        ("between 2 and 3", None),
        ("1 of 2", None),
        ("The first of 2 lines.\nThe answer is 72.", None),
        ("room B2", None),
        ("x-72", None),
        ("12:30", None),
        ("v1.2.3", None),
        ("10\u00b2", None),
    ],
)
def test_a_text_that_states_one_number_is_that_number(text: str, number: int | Decimal | None) -> None:
    assert read_only_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 10M", 10**7),
        ("#### 1.5B", 15 * 10**8),
        ("#### 10m", 10),
        ("#### $10m", 10**7),
        ("#### 10 m", 10),
        ("#### 10MB", 10),
        ("#### 72 (or 73)", None),
        ("#### 72 (and 73 more)", None),
        ("#### 72 (8 times 9)", 72),
    ],
)
def test_a_letter_behind_a_number_is_read_where_it_is_not_a_unit(text: str, number: int | None) -> None:
    assert read_number_behind("####", text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1'000", 1000),
        ("1\u2019000", 1000),
        ("10,00,000", 10**6),
        ("1,23,456.5", Decimal("123456.5")),
        ("72\\,000", 72_000),
        ("\uff17\uff12", 72),
        ("\u0667\u0662", 72),
        ("\uff11\uff0c\uff10\uff10\uff10\uff0e\uff15", Decimal("1000.5")),
        ("\u0661\u066c\u0660\u0660\u0660\u066b\u0665", Decimal("1000.5")),
        ("72 \u0663", None),
        ("1e5", 10**5),
        ("1.5E-3", Decimal("0.0015")),
        ("-2.4 \u00d7 10^5", -240_000),
        ("2.4 \\times 10^{-1}", Decimal("0.24")),
        ("2.4 \u00b7 10\u207b\u00b9", Decimal("0.24")),
        ("1e5000", None),
        ("1e5 and 3", None),
        ("2e3e4", None),
        ("\u221a5", None),
        ("\\boxed{\\sqrt{5}}", None),
        ("5\\sqrt{x}", None),
        ("\u00b15", None),
        ("5\u03c0", None),
        ("5 \\pi", None),
        ("x^5", None),
        ("log(5)", None),
        ("0xFF", None),
        ("0", 0),
        ("Answer \u2013 72", 72),
        ("Answer - 72", 72),
        ("Answer - $.5", Decimal("0.5")),
        ("Answer: -$72", -72),
        ("It is - 72", -72),
        ("x - 72", None),
        ("\\approx 72", 72),
        ("the catalog (72)", 72),
    ],
)
def test_an_answer_is_one_number_in_any_script_and_notation_and_no_expression(
    text: str, number: int | Decimal | None
) -> None:
    assert read_only_number(text) == number


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.decimals(-(10**20), 10**20, places=3))
def test_the_text_of_a_number_in_a_row_is_the_number(value: float | Decimal) -> None:
    text = text_or_none(value)
    assert text is not None
    assert graded(text, value) is True
    assert graded(text, 10**5000) is False
    assert graded(text, text) is True
    assert graded(f"Answer: {text}", f"Answer: {text}", marker="Answer:") is True


def graded(answer: str, reference: object, **arguments: object) -> bool | float | None:
    grader = number_grader(TaskSpec.model_validate({"name": "Number", **arguments}))
    return grader(answer, {"answer": reference}).scores.get("exact")


@pytest.mark.parametrize(
    ("answer", "reference", "arguments", "right"),
    [
        ("3.14", "3.14", {}, True),
        ("3.141", "3.14", {}, False),
        ("3.15", "3.14", {"tolerance": "0.01"}, True),
        ("3.1501", "3.14", {"tolerance": "0.01"}, False),
        ("101", "100", {"relativeTolerance": "0.01"}, True),
        ("-101", "-100", {"relativeTolerance": "0.01"}, True),
        ("102", "100", {"relativeTolerance": "0.01"}, False),
        ("It is 5.", 5, {}, True),
        ("0.1", 0.1, {}, True),
        ("first 3, then\nAnswer: 5 pears", "Answer: 5", {"marker": "Answer:"}, True),
        ("5", "Answer: 5", {"marker": "Answer:"}, False),
        ("5", "5 or 6", {}, None),
        ("5", None, {}, None),
        ("1", True, {}, None),
        ("5", float("nan"), {}, None),
        ("5", ["5"], {}, None),
    ],
)
def test_a_number_is_right_within_the_tolerance(
    answer: str, reference: object, arguments: dict[str, object], right: bool | None
) -> None:
    assert graded(answer, reference, **arguments) is right
