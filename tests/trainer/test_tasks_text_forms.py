"""Numbers in the texts that ExactMatch and Contains compare, white space and empty groups with Regex, and the fences
of JSON."""

from __future__ import annotations

import pytest

from finetune_core.api.task import TaskSpec
from finetune_trainer.evaluation.graders import GRADERS, Grade
from finetune_trainer.evaluation.graders.texts import EMPTY_GROUP, EMPTY_MATCH, NO_TEXT


def grade(name: str, answer: str, row: dict[str, object], **arguments: object) -> Grade:
    return GRADERS[name](TaskSpec.model_validate({"name": name, **arguments}))(answer, row)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (".5", ".5", True),
        ("(.5)", ".5", True),
        ("“.5”", ".5.", True),
        ("-.5", "-.5", True),
        ("٣.٥.", "٣.٥", True),
        ("3٫5!", "3٫5", True),
        ("Paris.5", "Paris5", True),
        ("wait...5", "wait5", True),
        ("(a).5", "a5", True),
        ("5", ".5", False),
        (".5", "5", False),
        ("-5", "-.5", False),
        (".5", "-.5", False),
        ("٣٥", "٣.٥", False),
        ("35", "3٫5", False),
        ("٥", "-٥", False),
        ("3.5", "3-.5", False),
        ("3.5", "3,.5", False),
    ],
)
def test_the_decimal_point_of_a_number_is_no_punctuation(answer: str, reference: str, right: bool) -> None:
    found = grade("ExactMatch", answer, {"answer": reference}, ignore=["Punctuation"])
    assert found.scores == {"exact": right}


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is .5.", ".5", True),
        ("It is (.5)", ".5", True),
        ("It is -.5", "-.5", True),
        ("It is ٣.٥.", "٣.٥", True),
        ("It is ٣٫٥.", "٣٫٥", True),
        ("١,٢", "٢", True),
        ("1-.5", "5", True),
        ("well...5", "5", True),
        ("It is .5.", "5", False),
        ("It is -.5", ".5", False),
        ("It is 0.5", ".5", False),
        ("It is -٥", "٥", False),
        ("It is ٣.٥.", "٥", False),
        ("It is ٣٫٥.", "٣", False),
        ("It is ١٬٠٠٠.", "١", False),
    ],
)
def test_a_number_is_not_found_behind_the_decimal_point_of_a_longer_one(
    answer: str, reference: str, right: bool
) -> None:
    assert grade("Contains", answer, {"answer": reference}).scores["contains"] is right


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "right"),
    [
        (r"Answer:\s*(.*)$", "Answer: B\n", "B", True),
        (r"Answer:\s*(.*)$", "Answer: B\n", "so\nAnswer: B \r\n\n", True),
        (r"^Answer: (.*)$", "\n Answer: B\n", "Answer: B", True),
        (r"(\w)$", "A or B \n", "B", True),
        (r"(\w)\n", "A\nB", "A\n", True),
        (r"^\s+(\w)", " B", " B", True),
        (r"Answer:\s*(.*)$", "Answer: A\n", "B", False),
        (r"Answer:\s*(.*)$", "Answer: B\nAnswer", "B", False),
        (r"(\w)\n", "B", "B\n", False),
    ],
)
def test_white_space_around_a_text_does_not_hide_what_a_pattern_finds(
    pattern: str, answer: str, reference: str, right: bool
) -> None:
    assert grade("Regex", answer, {"answer": reference}, pattern=pattern).scores["exact"] is right


@pytest.mark.parametrize(
    ("pattern", "reference", "reason"),
    [
        (r"(?:x(\d+))|(\d+)", "10", EMPTY_GROUP),
        (r"(x)?", "y", EMPTY_GROUP),
        (r"(x)?", ["x", "y"], EMPTY_GROUP),
        (r"x*", "y", EMPTY_MATCH),
        (r"(.*)", "", NO_TEXT),
        (r".*", " \n", NO_TEXT),
        (r"(x)", None, NO_TEXT),
    ],
)
def test_the_reason_of_a_row_without_a_right_answer_names_what_is_empty(
    pattern: str, reference: object, reason: str
) -> None:
    found = grade("Regex", "10", {"answer": reference}, pattern=pattern)
    assert (found.is_graded, found.problem) == (False, reason)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ('```json {"a":1} ```', '{"a": 1}', True),
        ('```JSON {"a":1}```', '{"a": 1}', True),
        ('```json{"a":1}```', '{"a": 1}', True),
        ('~~~json5 {"a":1} ~~~\n', '{"a": 1}', True),
        ('```{"a":1}```', '{"a": 1}', True),
        ("```null```", "null", True),
        ("``` 12 ```", "12", True),
        ("```json 12 ```", "12", True),
        ('```json "json"```', '"json"', True),
        ('```json {"a":2} ```', '{"a": 1}', False),
        ('```json {"a":1} ``` and more', '{"a": 1}', False),
        ('```json {"a":1} ~~~', '{"a": 1}', False),
        ('``json {"a":1}``', '{"a": 1}', False),
        ("```json```", "null", False),
        ("```", "null", False),
        ('```python {"a":1} ```', '{"a": 1}', False),
        ("```json" + "a" * 200_000, "1", False),
        ("```json" + " " * 200_000 + "x", "1", False),
        ("```" + " " * 200_000 + "`", "1", False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_fence_of_one_line_is_ignored(answer: str, reference: str, right: bool) -> None:
    assert grade("JSON", answer, {"answer": reference}).scores["equal"] is right
