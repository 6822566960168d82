"""The template language: columns, optional parts and braces become text, and a wrong template leads to an error whose
message is one sentence."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_core.api.dataset import template_rules
from finetune_core.row_templates import Piece, RowError, TemplateError, parse
from finetune_core.validation.cel_rules import holds

ALPACA = "### Instruction:\n{instruction}{#input}\n\n### Input:\n{input}{/input}\n\n### Response:\n"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def text(template: str, row: dict[str, Any], **aliases: str) -> str:
    return "".join(piece.text for piece in parse(template, aliases).pieces(row))


def test_every_column_of_a_row_has_its_place() -> None:
    row = {"a": "1", "b c": "2", "é": "3"}
    assert text("{a}-{b c}-{é}-{a}", row) == "1-2-3-1"
    assert parse("{a}-{b c}-{#é}.{/é}").columns == ["a", "b c", "é"]


def test_double_braces_are_braces() -> None:
    assert text('{{"q": "{a}"}} {{{a}}} {{a}} }}{{', {"a": "x"}) == '{"q": "x"} {x} {a} }{'


def test_braces_in_a_column_are_text() -> None:
    assert text("{a}", {"a": "{b} {{}} {#a}"}) == "{b} {{}} {#a}"


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}, {"input": " \n"}, {"input": []}])
def test_the_input_section_of_alpaca_vanishes_where_there_is_no_input(absent: dict[str, Any]) -> None:
    filled = text(ALPACA, {"instruction": "Add.", "input": "1 2"})
    assert filled == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert text(ALPACA, {"instruction": "Add.", **absent}) == "### Instruction:\nAdd.\n\n### Response:\n"


def test_a_part_can_stand_where_a_column_is_empty() -> None:
    template = "{x}{#a}with {a}{#b} and {b}{/b}{/a}{^a}without{/a}"
    assert text(template, {"x": "", "a": "1", "b": "2"}) == "with 1 and 2"
    assert text(template, {"x": "", "a": "1"}) == "with 1"
    assert text(template, {"x": "", "b": "2"}) == "without"


def test_zero_is_a_value_and_false_is_none_for_an_optional_part() -> None:
    assert text("{#n}n={n}{/n}{#f}f={f}{/f}{x}", {"n": 0, "f": False, "x": ""}) == "n=0"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x", "x"),
        ("", ""),
        (5, "5"),
        (-1.5, "-1.5"),
        (1e30, "1e+30"),
        (True, "true"),
        (False, "false"),
        (Decimal("1E+3"), "1000"),
        (date(2026, 11, 29), "2026-11-29"),
        (datetime(2026, 11, 29, 8, tzinfo=UTC), "2026-11-29T08:00:00+00:00"),
    ],
)
def test_values_that_have_one_text_are_shown_as_this_text(value: Any, shown: str) -> None:
    assert text("{a}", {"a": value}) == shown


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "has no 'a'"),
        ({"a": None}, "has no 'a'"),
        ({"a": ["x"]}, "has a 'a' that is not text (a list)"),
        ({"a": {"b": 1}}, "has a 'a' that is not text (an object)"),
        ({"a": float("nan")}, "has a 'a' that is not text (a number that is not finite)"),
        ({"a": Decimal("sNaN")}, "has a 'a' that is not text (a number that is not finite)"),
        ({"a": b"x"}, "has a 'a' that is not text (a value of type bytes)"),
        ({"a": "\ud83d"}, "has a 'a' that is not text (half of a surrogate pair)"),
    ],
)
def test_a_value_without_one_text_is_a_fault_of_the_row(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError) as caught:
        text("{a}", row)
    assert str(caught.value) == problem


def test_a_column_may_be_missing_where_its_part_does_not_stand() -> None:
    assert text("{x}{#a}{b}{/a}", {"x": "1"}) == "1"
    with pytest.raises(RowError, match="has no 'b'"):
        text("{x}{#a}{b}{/a}", {"x": "1", "a": "2"})


def test_an_alias_stands_for_a_column() -> None:
    template = parse("{prompt} {other}", {"prompt": "question"})
    assert template.names == {"question": "prompt", "other": "other"}
    assert template.pieces({"question": "q", "prompt": "p", "other": "o"}) == [
        Piece("q", from_row=True),
        Piece(" ", from_row=False),
        Piece("o", from_row=True),
    ]


WRONG = [
    ("{", "must hold each brace of the text twice (`{{` or `}}`): the `{` at character 1 has no counterpart"),
    ("{a}}", "must hold each brace of the text twice (`{{` or `}}`): the `}` at character 4 has no counterpart"),
    ('{"a": {b}}', "must hold each brace of the text twice (`{{` or `}}`): the `{` at character 1 has no counterpart"),
    ("{a}{}", "must name a column in each pair of braces"),
    ("{a}{#}{/}", "must name a column in each pair of braces"),
    ("{a}{\n}", "must name a column in each pair of braces"),
    ("", "must hold a column of the row, such as `{prompt}`"),
    ("{{prompt}}", "must hold a column of the row, such as `{prompt}`"),
    ("{#a}x{/a}", "must hold a column of the row, such as `{prompt}`"),
    ("{a}{#b}x", "must close each optional part: there is no `{/b}`"),
    ("{a}{/b}", "must close its optional parts in the reverse order of their beginnings: `{/b}` stands at character 4"),
    ("{#a}{#b}{x}{/a}{/b}", "must close its optional parts in the reverse order of their beginnings: `{/a}` stands at"),
]


@pytest.mark.parametrize(("template", "problem"), WRONG)
def test_a_wrong_template_gets_one_clear_sentence(template: str, problem: str) -> None:
    with pytest.raises(TemplateError, match="^" + re.escape(problem)):
        parse(template)


def test_the_rule_about_columns_says_what_doubled_braces_mean() -> None:
    rule, message = template_rules("template", "prompt")[1]
    assert not holds(rule, {"template": "{{instruction}}"})
    assert message.endswith("`{{prompt}}` is the text `{prompt}` and no column")
    assert text("{{instruction}}\n{input}", {"input": "x"}) == "{instruction}\nx"


@settings(derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["{", "}", "a", "#", "^", "/", "\n", "é", "{a}", "{#a}", "{/a}"]), max_size=9))
def test_the_rules_of_the_schema_refuse_the_templates_that_can_not_be_parsed(parts: list[str]) -> None:
    """The rules refuse every template that can't be parsed, and no other template. But a template with an optional part
    that is not closed, is closed without a beginning, or is nested wrongly may pass, because no regular expression can
    find all these mistakes."""
    template = "".join(parts)
    matches = all(holds(rule, {"template": template}) for rule, _ in template_rules("template", "prompt"))
    problem = ""
    try:
        parse(template)
    except TemplateError as error:
        problem = str(error)
    assert matches is (not problem) or "optional part" in problem


@settings(derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["instruction", "input", "x"]), VALUES))
def test_a_row_of_any_values_becomes_text_or_a_fault_of_the_row(row: dict[str, Any]) -> None:
    with suppress(RowError):
        assert all(piece.text for piece in parse(ALPACA).pieces(row))


@settings(derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.text())
def test_any_text_can_be_written_as_a_template(wanted: str) -> None:
    doubled = wanted.replace("{", "{{").replace("}", "}}")
    assert text("{x}" + doubled, {"x": ""}) == wanted


def test_deep_nesting_needs_no_recursion() -> None:
    deep = 500
    assert text("{#a}" * deep + "{a}" + "{/a}" * deep, {"a": "1"}) == "1"
