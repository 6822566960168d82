"""Each field of the published formats of rows is honoured, refused by name, or not read, as docs/data.md says.

`python -m tests.trainer.test_published_rows` writes the table into the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from finetune_core.api.dataset import DatasetFormat
from finetune_trainer.data.examples import Example
from finetune_trainer.data.formats import format_columns, renderer
from finetune_trainer.data.tokenizer import tokenize_functions
from tests.trainer.chat import byte_tokenizer, learned, published
from tests.trainer.published_rows import LINES, Line

PAGE = Path(__file__).parents[2] / "docs/data.md"
SHOWN = re.compile(r"<!-- generated: row formats -->\n.*?<!-- end -->", re.DOTALL)


def with_table(page: str) -> str:
    """Return ``page`` with the table of `published_rows.py` between the markers."""
    lines = [f"| {line.published} | {line.field} | {line.happens} |" for line in LINES]
    table = "\n".join(["| format | field | what happens |", "|---|---|---|", *lines])
    return SHOWN.sub(lambda _: f"<!-- generated: row formats -->\n\n{table}\n\n<!-- end -->", page)


def tokenizer_of(line: Line) -> PreTrainedTokenizerFast:
    return byte_tokenizer(line.template if "{" in line.template else published(line.template))


def examples_of(line: Line) -> Sequence[Example] | str:
    """Return the examples of the row of ``line``, or the phrase with which the row is refused."""
    form, tokenizer = DatasetFormat.model_validate(line.form), tokenizer_of(line)
    # From a parquet file the trainer reads only the columns that the format names, so other fields are left out here.
    fields = {name: value for name, value in line.row.items() if name in format_columns(form)}
    tokenize = tokenize_functions(tokenizer, ends=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    return renderer(form, tokenize)(fields)


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.published} {line.field}")
def test_a_field_of_a_published_format_is_honoured_or_refused_by_name(line: Line) -> None:
    tokenizer, examples = tokenizer_of(line), examples_of(line)
    if line.refused:
        assert isinstance(examples, str), examples
        assert examples.startswith(line.refused)
        return
    assert [text for texts in learned(tokenizer, examples) for text in texts] == list(line.learned)
    assert not isinstance(examples, str)
    last = examples[-1]
    assert line.shown in tokenizer.decode(list(last.ids[: last.spans[-1][0]]))
    assert not line.hidden or not any(line.hidden in tokenizer.decode(list(example.ids)) for example in examples)


FIELD = re.compile(r"has '(\w+)' in message (\d+) of")
"""The beginning of the phrase that refuses a field of a message, with the name of the field and the number of the
message."""


KNOWN = ("content", "name", "reasoning_content")
"""Fields of a message that the trainer knows, so that their values have types."""


def _unknown_field(line: Line) -> bool:
    found = FIELD.match(line.refused)
    return found is not None and found[1] not in KNOWN


@pytest.mark.parametrize(
    "line", [line for line in LINES if _unknown_field(line)], ids=lambda line: f"{line.published} {line.field}"
)
def test_a_refused_field_of_a_message_is_refused_with_each_value_and_free_to_be_empty(line: Line) -> None:
    found = FIELD.match(line.refused)
    assert found is not None
    name, number = found[1], int(found[2])
    ((column, messages),) = ((key, value) for key, value in line.row.items() if isinstance(value, list))
    answers = {}
    for value in (True, False, 0, 1, "x", ["x"], {"x": "x"}, None, "", [], {}):
        changed = [*messages[: number - 1], {**messages[number - 1], name: value}, *messages[number:]]
        examples = examples_of(line._replace(row={**line.row, column: changed}))
        answers[repr(value)] = isinstance(examples, str) and f"has {name!r}" in examples
    assert answers == {value: value not in ("None", "''", "[]", "{}") for value in answers}


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- generated: row formats -->") == 1
    assert page == with_table(page), "run: make docs"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
