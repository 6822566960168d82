"""Sets of examples: token ids and the ranges of supervised tokens, in numpy arrays that can be saved and memory-mapped.

On each node one process tokenizes the data files and saves the arrays. All ranks of the node memory-map the saved
arrays. So the time to tokenize and the memory for the token ids do not grow with the number of GPUs.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from finetune_core.row_templates import RowError, text_of
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.spooled_numbers import SpooledNumbers

ARRAYS = ("ids", "offsets", "spans", "span_offsets")
ROWS_FILE = "rows.json"


class Example(NamedTuple):
    """Token ids of one example, and the ranges of its supervised tokens. The range (12, 40) means the tokens 12
    to 39."""

    ids: Sequence[int] | npt.NDArray[np.integer]
    spans: Sequence[tuple[int, int]]
    read_as_text: Sequence[str] = ()
    """The control tokens, such as `</s>`, that are in the texts of the data row and were read as ordinary text.
    `ExampleSet` does not keep this field."""

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens for which a loss is computed. The first token of an example never counts, because the model
        predicts a token only from the tokens before it."""
        return sum(last - max(first, 1) for first, last in self.spans)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the first supervised token. These tokens are the prompt from which an answer is
        generated."""
        return self.spans[0][0]


class ExampleSet(Sequence[Example]):
    """The examples of a data source or of a mix, as an immutable sequence."""

    def __init__(self, arrays: dict[str, npt.NDArray[np.integer]], rows: Sequence[Row] = ()) -> None:
        """Use the given arrays, which `ExampleWriter.finish` made or `load` has read. ``rows`` are the data rows of the
        examples, if they were kept."""
        self._ids, self._offsets, self._spans, self._span_offsets = (arrays[name] for name in ARRAYS)
        self._arrays = arrays
        self.rows = rows
        """The data row of each example, which graders read. Empty if the rows were not kept."""
        self.lengths: Sequence[int] = array("i", np.diff(self._offsets).astype(np.int32).tobytes())
        """Number of tokens in each example."""

    @classmethod
    def empty(cls) -> ExampleSet:
        """Return a set without examples."""
        return ExampleWriter().finish()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        """Return one example, or a list of examples for a slice."""
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        ids = self._ids[self._offsets[row] : self._offsets[row + 1]]
        spans = self._spans[2 * self._span_offsets[row] : 2 * self._span_offsets[row + 1]].tolist()
        return Example(ids, list(zip(spans[::2], spans[1::2], strict=True)))

    def __iter__(self) -> Iterator[Example]:
        """Return an iterator over the examples."""
        return (self[row] for row in range(len(self)))

    @property
    def digest(self) -> str:
        """The sha256 of all token ids and of the ranges of supervised tokens. Sets with equal content have equal
        digests."""
        sha256 = hashlib.sha256()
        for name in ARRAYS:
            sha256.update(np.ascontiguousarray(self._arrays[name]).data)
        return sha256.hexdigest()

    @property
    def digest_with_rows(self) -> str:
        """The sha256 of `digest` and of the columns of all `rows`. The names of the data files make no difference."""
        columns = json.dumps([row.fields for row in self.rows], default=_as_text)
        return hashlib.sha256(f"{self.digest} {columns}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the set into ``folder``: one file for each array, and the data rows as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", self._arrays[name])
        rows = [{field.name: getattr(row, field.name) for field in fields(row)} for row in self.rows]
        (folder / ROWS_FILE).write_text(json.dumps(rows, default=_as_text))

    @classmethod
    def load(cls, folder: Path) -> ExampleSet:
        """Return the set that `save` wrote into ``folder``. The arrays are memory-mapped: token ids are read from the
        file when they are used."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        rows = json.loads((folder / ROWS_FILE).read_text())
        return cls(arrays, [Row(**row) for row in rows])


def graded_fields(row: Row) -> dict[str, Any]:
    """Return the columns of ``row`` as JSON values, which graders get. A value that JSON can't hold becomes a text. For
    a date or a decimal number, it is the text that templates show. For any other value, such as bytes of a parquet
    file, it is the result of `str`."""
    found: dict[str, Any] = json.loads(json.dumps(row.fields, default=_as_text))
    return found


def _as_text(value: object) -> str:
    try:
        return text_of("", value)
    except RowError:
        return str(value)


class ExampleWriter:
    """Collects examples one by one, with four bytes per token, and makes an `ExampleSet` of them. Many examples are
    collected in temporary files, and not in memory."""

    def __init__(self) -> None:
        """Create a writer without examples."""
        self._ids, self._offsets = SpooledNumbers(np.int32), SpooledNumbers(np.int64)
        self._spans, self._span_offsets = SpooledNumbers(np.int32), SpooledNumbers(np.int64)
        self._offsets.extend([0])
        self._span_offsets.extend([0])
        self._rows: list[Row] = []

    def add(self, example: Example, row: Row | None = None) -> None:
        """Append an example, and its data row if graders need the row."""
        self._ids.extend(example.ids)
        self._offsets.extend([len(self._ids)])
        for span in example.spans:
            self._spans.extend(span)
        self._span_offsets.extend([len(self._spans) // 2])
        if row is not None:
            self._rows.append(row)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._offsets) - 1

    def finish(self) -> ExampleSet:
        """Return the collected examples as an `ExampleSet`."""
        arrays: dict[str, npt.NDArray[np.integer]] = {
            "ids": self._ids.finish(),
            "offsets": self._offsets.finish(),
            "spans": self._spans.finish(),
            "span_offsets": self._span_offsets.finish(),
        }
        return ExampleSet(arrays, self._rows)


def joined(sets: Sequence[ExampleSet]) -> ExampleSet:
    """Return one set with the examples of all ``sets``, in their order."""
    if len(sets) == 1:
        return sets[0]
    writer = ExampleWriter()
    for examples in sets:
        for number, example in enumerate(examples):
            writer.add(example, examples.rows[number] if examples.rows else None)
    return writer.finish()


def example_set(examples: Sequence[Example]) -> ExampleSet:
    """Return ``examples`` as an `ExampleSet`, without the data rows that they were made from."""
    writer = ExampleWriter()
    for example in examples:
        writer.add(example)
    return writer.finish()
