"""Makes the examples of a data file. A row that can't become an example (a bad row) or that is too long is either
skipped or raises an error with file and line. `dataset.badRows` and `dataset.longRows` choose between the two.

The workers and the preflight checks call `make_examples`, and the launcher calls `check_columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.examples import ExampleSet, ExampleWriter
from finetune_trainer.data.formats import TokenizeFunctions, renderer, required_columns
from finetune_trainer.data.reader import Row, first_rows, read_rows

COLUMN_CHECK_BYTES = 8 * 1024 * 1024
"""Largest number of bytes of rows, from the beginning of a file, that are searched for the columns."""
COLUMN_CHECK_ROWS = 100
"""How many rows from the beginning of a file are searched for the columns that `dataset.format` names. A column that
none of these rows has is reported as a misspelled name in the spec, and the rows do not count as bad rows."""


class NoRowsError(UserError):
    """No usable row was found among the rows that were read. If only the beginning of a file was read, the rest may
    still have usable rows."""


@dataclass(frozen=True)
class LengthLimit:
    """The largest allowed length of an example in tokens, and which field or model sets it."""

    tokens: int
    origin: str
    """What sets the limit, as a phrase that follows "more than" in messages: `dataset.maxLength 512`."""


def length_limit(dataset: DatasetSpec, context: int | None) -> LengthLimit:
    """Return the length limit of a job's examples: the smaller one of `dataset.maxLength` and the model's ``context``
    (its longest input in tokens). ``context`` is None if the model has no limit."""
    if context is not None and context < dataset.max_length:
        return LengthLimit(context, f"the model's context of {context}")
    return LengthLimit(dataset.max_length, f"dataset.maxLength {dataset.max_length}")


def check_columns(path: Path, field: str, form: DatasetFormat, further: Mapping[str, str] | None = None) -> None:
    """Raise UserError if the file has no rows, or lacks a column that the format ``form`` reads, or one of ``further``
    columns, which are given by the fields of the spec that name them. Only the first
    COLUMN_CHECK_ROWS rows and COLUMN_CHECK_BYTES bytes are read. ``field`` names the file's field in the spec in error
    messages: `dataset.train`."""
    columns: dict[str, None] = {}
    parsed = total = 0
    for row in first_rows(read_rows(path, field), most_rows=COLUMN_CHECK_ROWS, most_bytes=COLUMN_CHECK_BYTES):
        columns |= dict.fromkeys(row.fields)
        total += 1
        parsed += row.problem is None
    if total == 0:
        raise UserError(field, f"{path.name} has no rows")
    if parsed == 0:
        # If no row can be parsed, nothing is raised here, because `make_examples` reports the problem of the first row.
        return
    for option, column in {**required_columns(form), **(further or {})}.items():
        if column not in columns:
            raise UserError(
                option,
                f"no column {column!r} in {path.name}; it has {', '.join(repr(found) for found in list(columns)[:12])}",
            )


def make_examples(
    rows: Iterable[Row],
    source: str,
    field: str,
    dataset: DatasetSpec,
    tokenize: TokenizeFunctions,
    *,
    limit: LengthLimit,
    keep_rows: bool = False,
) -> tuple[ExampleSet, list[str]]:
    """Return the examples of ``rows``, and up to two notices: how many bad rows and how many long rows were skipped.

    ``source`` names the data file in messages (`s3://bucket/train.jsonl`), and ``field`` is its path in the spec
    (`dataset.train`). With ``keep_rows`` the result also holds the data row of each example, because graders read the
    row's columns.

    Raises UserError with file and line for the first bad row unless `dataset.badRows` is Skip, and for the first long
    row unless `dataset.longRows` is Skip. Raises NoRowsError if no usable row is left.
    """
    render = renderer(dataset.format, tokenize)
    made = ExampleWriter()
    problems: dict[str, list[str]] = {"badRows": [], "longRows": []}

    def refuse(option: Literal["badRows", "longRows"], policy: Literal["Fail", "Skip"], problem: str) -> None:
        if policy == "Fail":
            raise UserError(field, f"{problem} (set dataset.{option} to Skip to leave such rows out)")
        problems[option].append(problem)

    for row in rows:
        rendered = row.problem or render(row.fields)
        if isinstance(rendered, str):
            refuse("badRows", dataset.bad_rows, f"{row.place(source)} {rendered}")
            continue
        length = len(rendered.ids)
        if length > limit.tokens:
            problem = f"{row.place(source)} has {length} tokens, more than {limit.origin}"
            refuse("longRows", dataset.long_rows, problem)
        elif rendered.supervised_tokens < 1:
            refuse("badRows", dataset.bad_rows, f"{row.place(source)} has no token to learn")
        else:
            made.add(rendered, row if keep_rows else None)
    notices = [
        _skipped(found, field, f"{option}: Skip", total=len(made)) for option, found in problems.items() if found
    ]
    if not len(made):
        raise NoRowsError(field, f"{source} has no row left to use" + "".join(f"; {text}" for text in notices))
    return made.finish(), notices


def _skipped(problems: Sequence[str], field: str, what: str, *, total: int) -> str:
    """Return a notice about skipped rows: how many were skipped and how many kept, and the problem of the first skipped
    row."""
    rows = "1 row was" if len(problems) == 1 else f"{len(problems)} rows were"
    return f"{field}: {rows} skipped and {total} kept ({what}); the first: {problems[0]}"
