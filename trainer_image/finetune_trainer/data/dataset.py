"""Makes the examples of a data source. A row that can't become examples (a bad row) is skipped, or ends the job with an
error that names file and line, as `dataset.badRows` says. A row with an example that is too long is skipped, split or
truncated, or ends the job, as `dataset.longRows` says.

The workers and the preflight checks call `make_examples`, and the launcher, the workers and the preflight checks call
`check_columns`. The launcher and the preflight checks also call `check_tools_of_mix`. The evaluation calls `used_rows`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.examples import Example, ExampleSet, ExampleWriter
from finetune_trainer.data.files.row import NamedColumn, Row
from finetune_trainer.data.formats import (
    Render,
    TokenizeFunctions,
    format_columns,
    renderer,
    required_columns,
    tools_column,
)
from finetune_trainer.data.long_rows import LongTexts
from finetune_trainer.data.prompts import base_prompt_columns
from finetune_trainer.data.reader import data_files, head_columns

COLUMN_CHECK_BYTES = 8 * 1024 * 1024
"""About how many bytes of rows, from the beginning of each file, are searched for the columns that the job names."""
COLUMN_CHECK_ROWS = 100
"""How many rows from the beginning of a data source are searched for the columns that the job names. A column that none
of these rows has is reported as an error of the spec, because its name may be misspelled. The rows do not count as bad
rows then."""
LONGEST_PROBLEM = 800
"""How many characters are kept of a phrase that says what is wrong with a row. The rest is cut off, because the phrase
may contain the name of a key, and such names can be of any length."""
GRADED_FIELDS = ("dataset.validation", "dataset.test")
"""The data sources whose rows are graded, where the job has a task."""


class NoRowsError(UserError):
    """No usable row was found among the rows that were read. If only the beginning of a file was read, the rest may
    still have usable rows."""


@dataclass(frozen=True)
class LengthLimit:
    """The largest allowed length of an example in tokens, what sets this length, and how many token ids the model
    has."""

    tokens: int
    origin: str
    """What sets the limit, as a phrase that follows "more than" in messages, for example `dataset.maxLength 512`."""
    rows: int | None = None
    """Number of rows of the model's embedding. A token with an id of this size or more can't be read. None where the
    number is not known."""


def length_limit(dataset: DatasetSpec, context: int | None, rows: int | None = None) -> LengthLimit:
    """Return the length limit of a job's examples: the smaller one of `dataset.maxLength` and the model's ``context``
    (its longest input in tokens). ``context`` is None if the model has no limit. ``rows`` is the number of rows of the
    model's embedding, if it is known."""
    if context is not None and context < dataset.max_length:
        return LengthLimit(context, f"the model's context of {context}", rows)
    return LengthLimit(dataset.max_length, f"dataset.maxLength {dataset.max_length}", rows)


def check_columns(path: Path, field: str, form: DatasetFormat, further: Iterable[NamedColumn] = ()) -> None:
    """Raise UserError if a data source has no rows, or if a column that the format ``form`` needs, or a column in
    ``further``, is in none of its first rows. ``path`` is the file of the source, or the folder with the index of its
    files. At most COLUMN_CHECK_ROWS rows are read, and about COLUMN_CHECK_BYTES bytes of a file. The columns of a
    parquet file are those of its schema. ``field`` is the path of the source in the spec, for example `dataset.train`.
    The message about a missing column begins with the field that names the column. Messages about the files begin with
    ``field``."""
    found = head_columns(path, field, most_rows=COLUMN_CHECK_ROWS, most_bytes=COLUMN_CHECK_BYTES)
    files = data_files(path)
    name = files[0].name if len(files) == 1 else f"the {len(files)} files"
    if found.total == 0:
        raise UserError(field, f"{name} has no rows" if len(files) == 1 else f"{name} have no rows")
    if found.parsed == 0:
        # If no row can be parsed, nothing is raised here, because `make_examples` reports the problem of the first row.
        return
    for column in (*required_columns(form), *tools_column(form, field), *further):
        if column.name not in found.names:
            seen = _shortened(", ".join(repr(name[:100]) for name in found.names[:12]))
            raise UserError(column.field, f"no column {column.name!r} in {name}; it has {seen}")


def check_tools_of_mix(sources: Mapping[str, Path], form: DatasetFormat) -> None:
    """Raise UserError if none of the first rows of all sources of a mix has the column that `toolsField` names. A
    source without tools is allowed in a mix, so `check_columns` says nothing about a single source. Nothing is raised
    if `toolsField` has its default value, or if there is a source of which no first row can be parsed.

    ``sources`` are the data sources by their paths in the spec. Sources that belong to no mix are left out.
    """
    mix = {field: path for field, path in sources.items() if field.startswith("dataset.train.mix[")}
    for column in tools_column(form, "dataset.train") if mix else ():
        heads = [
            head_columns(path, field, most_rows=COLUMN_CHECK_ROWS, most_bytes=COLUMN_CHECK_BYTES)
            for field, path in mix.items()
        ]
        if all(head.parsed and column.name not in head.names for head in heads):
            raise UserError(column.field, f"no column {column.name!r} in the {len(mix)} sources of dataset.train.mix")


def columns_read(dataset: DatasetSpec, field: str, base_prompt: str | None, graded: Collection[str]) -> set[str]:
    """Return the names of all columns that a job reads of the data source at the path ``field`` of the spec, for
    example `dataset.test`.

    These are the columns of the format. Rows that the base model is scored on also need the columns of ``base_prompt``
    (`evaluation.basePrompt`). Validation and test rows also need ``graded``, which are all columns that the job's
    grader reads.
    """
    asked = base_prompt_columns(dataset, field, base_prompt)
    found = {*format_columns(dataset.format), *(column.name for column in asked)}
    return {*found, *graded} if field in GRADED_FIELDS else found


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
    """Return the examples of ``rows``, and notices. The notices say how many rows were skipped, what became of rows
    that are too long, and, if some rows became several examples, how many examples were made. Another notice says how
    many of the kept rows have control tokens in their text that were read as ordinary text. A row is skipped as a
    whole, even if only one of its examples is bad.

    ``source`` is the name of the data source in messages, for example `s3://bucket/train.jsonl`. ``field`` is the path
    of the source in the spec, for example `dataset.train`. With ``keep_rows`` the result also has the data row of each
    example, because graders read the row's columns. Several examples that were made of one row have the same row.

    Raises UserError with file and line for the first bad row unless `dataset.badRows` is Skip, and for the first long
    row if `dataset.longRows` is Fail. Raises NoRowsError if no usable row is left.
    """
    render = renderer(dataset.format, tokenize, limit.tokens)

    def rendered() -> Iterator[tuple[Row, RowOutcome]]:
        for row in rows:
            try:
                yield row, render_row(row, dataset, render, limit)
            except UserError as error:
                yield row, error

    return collect_examples(rendered(), source, field, dataset, limit=limit, keep_rows=keep_rows)


def collect_examples(
    outcomes: Iterable[tuple[Row, RowOutcome]],
    source: str,
    field: str,
    dataset: DatasetSpec,
    *,
    limit: LengthLimit,
    keep_rows: bool = False,
    made: ExampleWriter | None = None,
) -> tuple[ExampleSet, list[str]]:
    """Return the examples and the notices of `make_examples`, from rows and what each of them became, in the order of
    the rows. The other arguments, and the errors, are those of `make_examples`. ``made`` collects the examples, and
    must be empty. None means a new `ExampleWriter`."""
    made = ExampleWriter() if made is None else made
    used = 0
    read_as_text = _Rows()
    skipped: dict[str, _Rows] = {}
    long_texts = LongTexts(dataset.long_rows, limit.tokens) if dataset.long_rows in ("Split", "Truncate") else None
    for row, outcome in outcomes:
        if isinstance(outcome, UserError):
            # The row shows a fault of the job, such as a chat template that does not end.
            raise UserError(outcome.subject, f"{outcome.problem} ({row.place(source)})") from outcome
        if isinstance(outcome, Refusal):
            problem = f"{row.place(source)} {outcome.problem}"
            if outcome.policy == "Fail":
                raise UserError(field, f"{problem} (set dataset.{outcome.option} to Skip to leave such rows out)")
            skipped.setdefault(outcome.option, _Rows()).add(problem)
            continue
        used += 1
        controls = [token for example in outcome for token in example.read_as_text]
        if controls:
            read_as_text.add(f"{row.place(source)} ({controls[0]!r})")
        for example in outcome:
            is_long = long_texts is not None and len(example.ids) > limit.tokens
            pieces = long_texts.pieces(example, row.place(source)) if long_texts is not None and is_long else [example]
            for piece in pieces:
                made.add(piece, row if keep_rows else None)
    notices = [found.notice(field, f"{option}: Skip", total=used) for option, found in sorted(skipped.items())]
    if long_texts is not None and long_texts.rows:
        notices.append(f"{field}: {long_texts.notice}")
    elif len(made) > used:
        notices.append(f"{field}: {used} {'row' if used == 1 else 'rows'} became {len(made)} examples")
    if read_as_text.rows:
        notices.append(_controls(read_as_text, field))
    if not len(made):
        raise NoRowsError(field, f"{source} has no row left to use" + "".join(f"; {text}" for text in notices))
    return made.finish(), notices


def used_rows(
    rows: Iterable[Row], dataset: DatasetSpec, tokenize: TokenizeFunctions, *, limit: LengthLimit
) -> Iterator[Row]:
    """Yield those of ``rows`` of which `make_examples` makes examples. Rows that it skips or refuses are left out."""
    render = renderer(dataset.format, tokenize, limit.tokens)
    return (row for row in rows if not isinstance(render_row(row, dataset, render, limit), Refusal))


class Refusal(NamedTuple):
    """Why a row can't be used."""

    option: Literal["badRows", "longRows"]
    """The field of `dataset` that says what happens to the row."""
    policy: str
    """The value of that field."""
    problem: str
    """What is wrong with the row, as a phrase that follows its place."""


RowOutcome = Sequence[Example] | Refusal | UserError
"""What a row becomes: its examples, at least one, or why it can't be used, or an error that ends the job."""


def render_row(row: Row, dataset: DatasetSpec, render: Render, limit: LengthLimit) -> Sequence[Example] | Refusal:
    """Return the examples of a row, or why the row can't be used. Examples are longer than ``limit.tokens`` only where
    `dataset.longRows` is Split or Truncate, because `collect_examples` then makes shorter examples of them. Raises
    UserError where the row shows a fault of the job."""
    rendered = row.problem or render(row.fields)
    if isinstance(rendered, str):
        return Refusal("badRows", dataset.bad_rows, _shortened(rendered))
    highest = max((max(example.ids, default=0) for example in rendered), default=0)
    if limit.rows is not None and highest >= limit.rows:
        return Refusal(
            "badRows",
            dataset.bad_rows,
            f"has a token with the id {highest}, and the model's embedding has only {limit.rows} rows",
        )
    length = max(len(example.ids) for example in rendered)
    if length > limit.tokens and dataset.long_rows in ("Fail", "Skip"):
        return Refusal("longRows", dataset.long_rows, f"has {length} tokens, more than {limit.origin}")
    if min(example.supervised_tokens for example in rendered) < 1:
        return Refusal("badRows", dataset.bad_rows, "has no token to learn")
    return rendered


def _shortened(text: str) -> str:
    """Return ``text``. If it has more than LONGEST_PROBLEM characters, `...` takes the place of the rest."""
    return text if len(text) <= LONGEST_PROBLEM else f"{text[:LONGEST_PROBLEM]}..."


@dataclass
class _Rows:
    """Rows that have one thing in common: how many there are, and a text about the first of them."""

    first: str = ""
    """The text about the first row, which begins with the row's place."""
    rows: int = 0

    def add(self, told: str) -> None:
        """Count a row. ``told`` is the text about the row."""
        self.first = self.first or told
        self.rows += 1

    def notice(self, field: str, what: str, *, total: int) -> str:
        """Return a notice about these rows as skipped rows: how many rows were skipped, that ``total`` rows were kept,
        and the problem of the first skipped row. ``what`` is the reason, for example `badRows: Skip`."""
        rows = "1 row was" if self.rows == 1 else f"{self.rows} rows were"
        return f"{field}: {rows} skipped and {total} kept ({what}); the first: {self.first}"


def _controls(found: _Rows, field: str) -> str:
    """Return a notice about rows with control tokens that were read as ordinary text."""
    rows = "1 row has control tokens" if found.rows == 1 else f"{found.rows} rows have control tokens"
    return (
        f"{field}: {rows} of the model in the text, which were read as ordinary text (set allowSpecialTokens of"
        f" dataset.format to true if they are meant as such); the first: {found.first}"
    )
