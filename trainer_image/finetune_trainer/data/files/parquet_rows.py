"""Reads parquet files: only the columns that are wanted, and a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
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

    A float16 or float32 becomes the number with the shortest decimal text that stands for the same value of that type:
    0.1, and not 0.10000000149011612. In the arguments of a tool call, keys of structs that are null are left out (see
    `_conversion`). A value that Python can't hold, such as a time with nanoseconds, is a problem of its row.

    Raises FileProblem if the schema has a column twice or if the rows expand to too much, and whatever pyarrow raises
    for a damaged file.
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


_Conversion = Callable[[Any], Any]


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
    convert = _conversion(column.type) or _as_it_is
    try:
        values: Sequence[Any] = column.to_pylist()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (pyarrow raises whatever the conversion of one value makes it raise)
        return [_value(column[index], convert) for index in range(len(column))]
    return values if convert is _as_it_is else [convert(value) for value in values]


def _value(scalar: Any, convert: _Conversion) -> Any:
    try:
        return convert(scalar.as_py())
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (as in `_values`)
        return _Unreadable(first_line(error))


def _as_it_is(value: Any) -> Any:
    return value


def _conversion(kind: Any, *, in_arguments: bool = False) -> _Conversion | None:
    """Return the function that completes the conversion of a value of the Arrow type ``kind`` from pyarrow's Python
    object, or None if nothing is left to do.

    pyarrow widens float16 and float32 to float64, which shows digits that nobody wrote. With ``in_arguments``, keys of
    structs that are null are left out: all rows of a parquet file have the same keys, so the file cannot tell an
    argument that the call lacks from an argument that is null.
    """
    from pyarrow import types

    if types.is_float16(kind) or types.is_float32(kind):
        import numpy

        narrow = numpy.float16 if types.is_float16(kind) else numpy.float32
        return lambda value: None if value is None else float(str(narrow(value)))
    if types.is_struct(kind):
        return _of_struct([kind.field(index) for index in range(kind.num_fields)], in_arguments=in_arguments)
    if types.is_map(kind):
        of_key, of_item = _conversion(kind.key_type), _conversion(kind.item_type, in_arguments=in_arguments)
        if of_key is None and of_item is None:
            return None
        key, item = of_key or _as_it_is, of_item or _as_it_is
        return lambda pairs: None if pairs is None else [(key(name), item(value)) for name, value in pairs]
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _conversion(kind.value_type, in_arguments=in_arguments)
    if any(is_kind(kind) for is_kind in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        of_each = _conversion(kind.value_type, in_arguments=in_arguments)
        return of_each and (lambda values: None if values is None else [of_each(value) for value in values])
    return None


def _of_struct(fields: Sequence[Any], *, in_arguments: bool) -> _Conversion | None:
    """Return the conversion of structs with ``fields``. A struct with a `name` and `arguments` is a tool call."""
    is_call = {"name", "arguments"} <= {field.name for field in fields}
    found = {
        field.name: _conversion(field.type, in_arguments=in_arguments or (is_call and field.name == "arguments"))
        for field in fields
    }
    conversions = {name: convert for name, convert in found.items() if convert is not None}
    if not conversions and not in_arguments:
        return None

    def converted(value: Any) -> Any:
        if value is None:
            return None
        return {
            key: conversions.get(key, _as_it_is)(item)
            for key, item in value.items()
            if item is not None or not in_arguments
        }

    return converted


def _row(number: int, names: Sequence[str], values: Sequence[Any]) -> Row:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, _Unreadable):
            return Row(number, {}, f"has a {name!r} that can't be read ({value.reason})", unit="row")
    return Row(number, dict(zip(names, values, strict=True)), unit="row")
