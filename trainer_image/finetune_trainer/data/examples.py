"""Makes examples of rows: prompt and completion as token ids, and what happens to rows that can't become one.

The prompt is tokenised alone and the completion after it, because that is what the model sees when it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from finetune_core.api.dataset import DatasetSpec, PromptCompletionFormat
from finetune_core.errors import UserError
from finetune_trainer.data.reader import Row, read_rows

FORMAT_PATH = "dataset.format.promptCompletion"
COLUMN_CHECK_ROWS = 100
"""A column that none of this many first rows has is a wrong name, not a bad row."""


class Example(NamedTuple):
    """Token ids of prompt, completion and end token; those from ``prompt_tokens`` on are supervised."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens that the loss is taken on; the very first token of a text has nothing to predict it."""
        return len(self.ids) - max(self.prompt_tokens, 1)


class Tokenize(NamedTuple):
    """The two ways that text becomes token ids, and the end token."""

    prompt: Callable[[str], Sequence[int]]
    """With the tokens that the tokenizer puts in front of a text."""
    completion: Callable[[str], Sequence[int]]
    """Without any."""
    end: int


@dataclass
class Examples:
    """The examples of a data file, and what was left out."""

    examples: list[Example] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """The row of each example, which the answer that is generated for it is graded against."""
    notices: list[str] = field(default_factory=list)
    """One sentence for each kind of row that was skipped."""


def check_columns(path: Path, name: str, form: PromptCompletionFormat) -> None:
    """Raise UserError where the file has no rows or no such columns; reads only the first rows."""
    columns: dict[str, None] = {}
    parsed = total = 0
    for row in read_rows(path, name):
        columns |= dict.fromkeys(row.fields)
        total += 1
        parsed += row.problem is None
        if total == COLUMN_CHECK_ROWS:
            break
    if total == 0:
        raise UserError(name, f"{path.name} has no rows")
    if parsed == 0:
        return  # Every row is broken: reading all of them says how, by row.
    for option, column in (("promptField", form.prompt_field), ("completionField", form.completion_field)):
        if column not in columns:
            raise UserError(
                f"{FORMAT_PATH}.{option}",
                f"no column {column!r} in {path.name}; it has {', '.join(repr(name) for name in list(columns)[:12])}",
            )


def _texts(row: Row, form: PromptCompletionFormat) -> tuple[str, str] | str:
    """Return prompt and completion of a row, or what is wrong with it."""
    if row.problem is not None:
        return row.problem
    values = []
    for column in (form.prompt_field, form.completion_field):
        value = row.fields.get(column)
        if value is None:
            return f"has no {column!r}"
        if not isinstance(value, str):
            return f"has a {column!r} that is not text"
        values.append(value)
    prompt, completion = values
    if not completion.strip():
        return f"has an empty {form.completion_field!r}"
    return prompt, completion


def _skipped(problems: Sequence[str], name: str, what: str) -> str:
    """Return the notice about skipped rows: their number, and the first of them."""
    rows = "1 row was" if len(problems) == 1 else f"{len(problems)} rows were"
    return f"{name}: {rows} skipped ({what}); the first: {problems[0]}"


def make_examples(rows: Iterable[Row], file: str, name: str, dataset: DatasetSpec, tokenize: Tokenize) -> Examples:
    """Return the examples of ``rows`` of data file ``file``; ``name`` is the field path of the file.

    Raises UserError that names file and line of the first row that is bad or too long where the job asks to
    fail, and where no row is left.
    """
    form = dataset.format.prompt_completion
    if form is None:
        raise UserError("dataset.format", "must be promptCompletion")
    made = Examples()
    problems: dict[str, list[str]] = {"badRows": [], "longRows": []}

    def refuse(option: Literal["badRows", "longRows"], policy: Literal["Fail", "Skip"], problem: str) -> None:
        if policy == "Fail":
            raise UserError(name, f"{problem} (set dataset.{option} to Skip to leave such rows out)")
        problems[option].append(problem)

    for row in rows:
        texts = _texts(row, form)
        if isinstance(texts, str):
            refuse("badRows", dataset.bad_rows, f"{file} line {row.line} {texts}")
            continue
        prompt = tokenize.prompt(form.template.replace("{prompt}", texts[0]))
        ids = (*prompt, *tokenize.completion(texts[1]), tokenize.end)
        if len(ids) > dataset.max_length:
            limit = f"more than dataset.maxLength {dataset.max_length}"
            refuse("longRows", dataset.long_rows, f"{file} line {row.line} has {len(ids)} tokens, {limit}")
            continue
        made.examples.append(Example(ids, len(prompt)))
        made.rows.append(row)
    if problems["badRows"]:
        made.notices.append(_skipped(problems["badRows"], name, "badRows: Skip"))
    if problems["longRows"]:
        made.notices.append(_skipped(problems["longRows"], name, "longRows: Skip"))
    if not made.examples:
        raise UserError(name, f"{file} has no row left to use" + "".join(f"; {text}" for text in made.notices))
    return made
