"""Reads parquet files: only the columns that are wanted, and a few rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from finetune_trainer.data.files.row import Row, repeated
from finetune_trainer.data.files.streams import BLOCK_BYTES, FileProblem, check_expansion
from finetune_trainer.pod.errors import first_line

BATCH_ROWS = 8
BATCH_BYTES = 8 * 1024 * 1024
"""Limits on how many rows are decoded at once: at most BATCH_ROWS, and fewer if BATCH_ROWS rows of average size would
have more than BATCH_BYTES. Some rows are much larger than the average, for example where the file stores one text only
once for many rows, or where several long rows follow each other. For these rows, only BATCH_ROWS bounds the memory.
Larger batches would save a few microseconds a row."""
ROW_BYTES = 16
"""Smallest number of bytes that is counted for a row in the check of what a file expands to. A row without values takes
no bytes in memory, but reading it takes time."""


def parquet_rows(
    file: Path | BinaryIO, size: int, columns: Collection[str] | None, *, is_head: bool = False
) -> Iterator[Row]:
    """Yield the rows of a parquet file of ``size`` bytes, with ``is_head`` only those of its first row group. If the
    file has any of ``columns``, only these columns are decoded. Otherwise, or if ``columns`` is None, all columns are.

    A value that Python can't hold, such as a time with nanoseconds, is a problem of its row. Raises FileProblem if the
    schema has a column twice or if the rows expand to too much, and whatever pyarrow raises for a damaged file.
    """
    from pyarrow import parquet

    number = content = 0
    # Without `pre_buffer`, and with a buffer, pyarrow reads a column page by page instead of a whole row group at once.
    with parquet.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False) as opened:
        found = [name for name in _column_names(opened) if columns is None or name in columns]
        rows = _batch_rows(opened.metadata)
        groups = range(min(1, opened.num_row_groups) if is_head else opened.num_row_groups)
        for batch in opened.iter_batches(
            batch_size=rows, row_groups=list(groups), columns=found or None, use_threads=False
        ):
            content += max(batch.nbytes, ROW_BYTES * batch.num_rows)
            check_expansion(content, size)
            names = [name for name in batch.schema.names if not found or name in found]
            for values in _rows_of(batch, names):
                number += 1
                yield _row(number, names, values)


def parquet_schema(file: Path | BinaryIO) -> tuple[list[str], int]:
    """Return the names of the columns of a parquet file, and the number of its rows. No row is decoded.

    Raises FileProblem if the schema has a column twice, and whatever pyarrow raises for a damaged file.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        return _column_names(opened), opened.metadata.num_rows


def _column_names(opened: Any) -> list[str]:
    """Return the names of the columns. Raises FileProblem if a name occurs twice."""
    names: list[str] = list(opened.schema_arrow.names)
    twice = repeated(names)
    if twice is not None:
        raise FileProblem(f"has the column {twice!r} twice")
    return names


def _batch_rows(metadata: Any) -> int:
    """Return how many rows are decoded at once: as many as BATCH_BYTES hold in the row group with the largest rows, but
    at least one and at most BATCH_ROWS.

    All columns of a row count, also those that are not read. The sizes of single columns are not asked for, because
    pyarrow ends the whole process if the statistics of a column are damaged.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))


class _Unreadable:
    """Takes the place of a value that Python can't hold."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _rows_of(batch: Any, names: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Yield the values of each row. If the rows are large, they become Python objects one by one, so that only one row
    is in memory twice."""
    columns = [batch.column(name) for name in names]
    if batch.nbytes > BATCH_BYTES:
        for position in range(batch.num_rows):
            yield [_values(column.slice(position, 1))[0] for column in columns]
    else:
        values = [_values(column) for column in columns]
        for position in range(batch.num_rows):
            yield [column[position] for column in values]


def _values(column: Any) -> Sequence[Any]:
    """Return the values of a column as Python objects."""
    try:
        values: Sequence[Any] = column.to_pylist()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (pyarrow raises whatever the conversion of one value makes it raise)
        return [_value(column[index]) for index in range(len(column))]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (as in `_values`)
        return _Unreadable(first_line(error))


def _row(number: int, names: Sequence[str], values: Sequence[Any]) -> Row:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, _Unreadable):
            return Row(number, {}, f"has a {name!r} that can't be read ({value.reason})", unit="row")
    return Row(number, dict(zip(names, values, strict=True)), unit="row")
