"""White space around an answer, line breaks of every kind and a Markdown fence change no grade, and no regular
expression of the product ends in a `$` that accepts a line break behind the text."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_core.api.task import TaskSpec
from finetune_trainer.evaluation.graders import GRADERS, Grade

ROOT = Path(__file__).parents[2]
PACKAGES = ["core/finetune_core", "operator/finetune_operator", "trainer_image/finetune_trainer"]
parser: Any = importlib.import_module("re._parser")
"""Python's parser of regular expressions. It is declared as Any, because the module has no type information."""
SPACES = st.text(st.sampled_from(" \t\n\r\f\v\u00a0\u2003\u2028\u2029\u0085"), max_size=4)


def grade(name: str, answer: str, row: dict[str, object], **arguments: object) -> Grade:
    return GRADERS[name](TaskSpec.model_validate({"name": name, **arguments}))(answer, row)


ROWS: list[tuple[str, str, dict[str, object]]] = [
    ("Number", "42", {"answer": "42"}),
    ("Number", "-4.5", {"answer": "-4.5"}),
    ("Number", "$42", {"answer": "42"}),
    ("Number", "42 apples", {"answer": "42"}),
    ("Choice", "B", {"answer": "B", "choices": ["London", "Paris"]}),
    ("Choice", "Paris", {"answer": "B", "choices": ["London", "Paris"]}),
    ("ExactMatch", "Paris", {"answer": "Paris"}),
]


@given(st.sampled_from(ROWS), SPACES, SPACES)
@example(ROWS[0], "\n", "")
@example(ROWS[0], "\r\n", "\n")
def test_white_space_around_an_answer_changes_no_grade(
    case: tuple[str, str, dict[str, object]], before: str, behind: str
) -> None:
    name, answer, row = case
    assert grade(name, before + answer + behind, row).scores == {"exact": True}
    if isinstance(own := row["answer"], str):
        assert grade(name, answer, row | {"answer": before + own + behind}).scores == {"exact": True}


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\n\n", "\n \n\t"])
@pytest.mark.parametrize("before", ["", "The answer is", "We compute.", "Total:", "a", "```", "```text", "Answer -"])
@pytest.mark.parametrize("number", ["42", "-42", "$42", "**42**", ".5", "42 apples", "\\boxed{42}"])
def test_a_number_at_the_beginning_of_a_line_is_read(before: str, line_break: str, number: str) -> None:
    value = {"-42": "-42", ".5": "0.5"}.get(number, "42")
    fence = line_break + "```" if before.startswith("`") else ""
    text = before + line_break + number + fence
    assert grade("Number", text, {"answer": value}).scores == {"exact": True}
    assert grade("Number", value, {"answer": text}).scores == {"exact": True}


def has_dollar(tokens: Any) -> bool:
    """Return whether ``tokens``, a parsed regular expression, have a `$`."""
    if isinstance(tokens, parser.SubPattern | list | tuple):
        return any(has_dollar(token) for token in tokens)
    return str(tokens) == "AT_END"


def patterns(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each pattern that ``source`` hands to the module `re`, except for those of
    `fullmatch` and of calls with MULTILINE. The parts of an f-string that are computed count as one letter."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        if ast.unparse(node.func.value) != "re" or node.func.attr in ("fullmatch", "escape"):
            continue
        if "re.MULTILINE" in ast.unparse(node):
            continue
        parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant | ast.FormattedValue)]
        inner = {id(deep) for part in parts if isinstance(part, ast.FormattedValue) for deep in ast.walk(part.value)}
        parts = [part for part in parts if id(part) not in inner]
        parts.sort(key=lambda part: (part.lineno, part.col_offset))
        yield (
            node.lineno,
            "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts),
        )


def test_the_scan_finds_a_dollar() -> None:
    source = (
        're.compile(rf"a{b}?$")\nre.search("[$]\\\\$", x)\nre.fullmatch("a$", x)\nre.findall("a$", x, re.MULTILINE)'
    )
    assert [(line, has_dollar(parser.parse(text))) for line, text in patterns(source)] == [(1, True), (2, False)]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pattern_ends_in_a_dollar(package: str) -> None:
    """In Python a `$` also matches before a line break at the end of the text. The end of the text is `\\Z`."""
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for line, text in patterns(file.read_text(encoding="utf-8"))
        if has_dollar(parser.parse(text))
    ]
    assert found == []


@pytest.mark.parametrize("sign", ["R$ ", "R$", "R\\$", "S$", "₺", "₪ ", "₫", "฿", "US$ "])
def test_a_currency_sign_of_any_country_is_ignored(sign: str) -> None:
    for answer in (f"{sign}42", f"It costs -{sign}42 in all."):
        value = "-42" if "-" in answer else "42"
        assert grade("Number", answer, {"answer": value}).scores == {"exact": True}
    assert grade("GSM8K", f"#### {sign}42", {"answer": "#### 42"}).scores == {"exact": True}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *((f"3 {word}", False) for word in ["thirds", "fourths", "fifths", "sixths", "sevenths", "eighths", "tenths"]),
        *((f"3 {word}", False) for word in ["elevenths", "twelfths", "thirteenths", "twentieths", "fiftieths"]),
        *((f"3 {word}", False) for word in ["hundredths", "thousandths", "millionths", "billionths"]),
        ("3 hundred thousandths", False),
        ("3 ten-thousandths of a metre", False),
        ("3-tenths", False),
        ("3 tenth of it", False),
        ("3 fifth.", False),
        ("3 sixth graders", True),
        ("3 third-party tools", True),
        ("3 seconds", True),
        ("3 quarters", True),
        ("3 months", True),
        ("3 teeth", True),
    ],
)
def test_a_fraction_in_words_is_no_number(answer: str, right: bool) -> None:
    assert grade("Number", answer, {"answer": "3"}).scores == {"exact": right}
    assert grade("GSM8K", f"#### {answer}", {"answer": "#### 3"}).scores == {"exact": right}
