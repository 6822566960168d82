"""Makes the examples of a data file, and says what happens to rows that can't become one: named by file and row,
counted, and skipped or fatal as the job asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.examples import ExampleSet, ExampleWriter
from finetune_trainer.data.formats import TokenizeFunctions, renderer, required_columns
from finetune_trainer.data.reader import Row, read_rows

COLUMN_CHECK_ROWS = 100
"""A column that none of this many first rows has is a wrong name, not a bad row."""


class NoRowsError(UserError):
    """No row is left to use. Of a part of the file that says nothing about the whole."""


@dataclass(frozen=True)
class LengthLimit:
    """The longest example in tokens, and what sets it."""

    tokens: int
    because: str
    """As in `more than dataset.maxLength 512`."""


def length_limit(dataset: DatasetSpec, context: int | None) -> LengthLimit:
    """Return the limit of a job whose model reads at most ``context`` tokens, where that is known."""
    if context is not None and context < dataset.max_length:
        return LengthLimit(context, f"the model's context of {context}")
    return LengthLimit(dataset.max_length, f"dataset.maxLength {dataset.max_length}")


def check_columns(path: Path, name: str, form: DatasetFormat) -> None:
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
    for option, column in required_columns(form).items():
        if column not in columns:
            raise UserError(
                option,
                f"no column {column!r} in {path.name}; it has {', '.join(repr(name) for name in list(columns)[:12])}",
            )


def make_examples(
    rows: Iterable[Row],
    source: str,
    name: str,
    dataset: DatasetSpec,
    tokenize: TokenizeFunctions,
    *,
    limit: LengthLimit,
    keep_rows: bool = False,
) -> tuple[ExampleSet, list[str]]:
    """Return the examples of ``rows``, and a sentence for each kind of row that was skipped.

    ``source`` is how a person calls the file, ``name`` its field path. ``keep_rows`` keeps what a grader reads.
    Raises UserError that names file and row of the first one that is bad or too long where the job asks to fail,
    and NoRowsError where no row is left.
    """
    render = renderer(dataset.format, tokenize)
    made = ExampleWriter()
    problems: dict[str, list[str]] = {"badRows": [], "longRows": []}

    def refuse(option: Literal["badRows", "longRows"], policy: Literal["Fail", "Skip"], problem: str) -> None:
        if policy == "Fail":
            raise UserError(name, f"{problem} (set dataset.{option} to Skip to leave such rows out)")
        problems[option].append(problem)

    for row in rows:
        rendered = row.problem or render(row.fields)
        if isinstance(rendered, str):
            refuse("badRows", dataset.bad_rows, f"{row.place(source)} {rendered}")
            continue
        length = len(rendered.ids)
        if length > limit.tokens:
            problem = f"{row.place(source)} has {length} tokens, more than {limit.because}"
            refuse("longRows", dataset.long_rows, problem)
        elif rendered.supervised_tokens < 1:
            refuse("badRows", dataset.bad_rows, f"{row.place(source)} has no token to learn")
        else:
            made.add(rendered, row if keep_rows else None)
    notices = [_skipped(found, name, f"{option}: Skip", total=len(made)) for option, found in problems.items() if found]
    if not len(made):
        raise NoRowsError(name, f"{source} has no row left to use" + "".join(f"; {text}" for text in notices))
    return made.finish(), notices


def _skipped(problems: Sequence[str], name: str, what: str, *, total: int) -> str:
    """Return the notice about skipped rows: their number, and the first of them."""
    rows = "1 row was" if len(problems) == 1 else f"{len(problems)} rows were"
    return f"{name}: {rows} skipped and {total} kept ({what}); the first: {problems[0]}"
