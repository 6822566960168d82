"""Each field of the published formats of rows is honoured, refused by name, or not read, as docs/data.md says.

`python -m tests.trainer.test_published_rows` writes the table into the page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_core.api.dataset import DatasetFormat
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


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.published} {line.field}")
def test_a_field_of_a_published_format_is_honoured_or_refused_by_name(line: Line) -> None:
    template = line.template if "{" in line.template else published(line.template)
    tokenizer = byte_tokenizer(template)
    form = DatasetFormat.model_validate(line.form)
    # From a parquet file the trainer reads only the columns that the format names, so other fields are left out here.
    fields = {name: value for name, value in line.row.items() if name in format_columns(form)}
    examples = renderer(form, tokenize_functions(tokenizer, ends=[tokenizer.convert_tokens_to_ids("<|im_end|>")]))(
        fields
    )
    if line.refused:
        assert isinstance(examples, str), examples
        assert examples.startswith(line.refused)
        return
    assert [text for texts in learned(tokenizer, examples) for text in texts] == list(line.learned)
    assert not isinstance(examples, str)
    last = examples[-1]
    assert line.shown in tokenizer.decode(list(last.ids[: last.spans[-1][0]]))
    assert not line.hidden or not any(line.hidden in tokenizer.decode(list(example.ids)) for example in examples)


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- generated: row formats -->") == 1
    assert page == with_table(page), "run: make docs"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
