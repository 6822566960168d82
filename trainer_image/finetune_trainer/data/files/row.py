"""`Row` is a row of a data file with its place in the file, and `NamedColumn` is a column that a field of the spec
names. The readers of all kinds of files yield `Row` objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from finetune_core.errors import valid_text


class NamedColumn(NamedTuple):
    """A column that a field of the spec names."""

    field: str
    """Path of the field in the spec, for example `dataset.format.text.textField`."""
    name: str


def repeated(names: Iterable[str]) -> str | None:
    """Return the first item of ``names`` that equals an earlier item. None if no name occurs twice. The function takes
    time in proportion to the number of names, because a user's row may have a million names."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


@dataclass(frozen=True)
class Row:
    """One row of a data file: its place in the file, and either its columns or what is wrong with it."""

    number: int
    """Line on which the row begins, counted from 1. In parquet and .json files, number of the row, counted from 1."""
    fields: Mapping[str, Any]
    problem: str | None = None
    unit: Literal["line", "row"] = "line"
    file: str = ""
    """Name of the file that holds the row, for messages, for example `s3://bucket/rows/part-1.jsonl`. Empty only if the
    data source is a single file, so that the name of the data source names the file already."""

    def place(self, source: str) -> str:
        """Return the place of the row for messages: `data/train.jsonl line 12`, if ``source`` is `data/train.jsonl`.
        ``source`` is the name of the data source."""
        return valid_text(f"{self.file or source} {self.unit} {self.number}")
