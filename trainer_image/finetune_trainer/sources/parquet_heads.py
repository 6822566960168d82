"""Fetches only those parts of a large parquet file that a check needs: the schema, and the wanted columns of the first
row group. The store and the hub are asked for ranges of bytes.

The result is a local file of the same length with holes, so that all offsets in the schema stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from finetune_trainer.sources.parquet_chunks import PlacesUnknownError, first_row_group

Read = Callable[[int, int], bytes]
"""A function that returns bytes of the file. Its arguments are the offset of the first byte and the number of bytes."""
_MAGIC = b"PAR1"
_END_BYTES = 8
"""Size of the end of a parquet file: the length of the schema in four bytes, and the magic bytes."""


def fetch_parquet_head(
    read: Read, size: int, path: Path, *, columns: Collection[str], most_bytes: int
) -> tuple[bool, bool]:
    """Write the schema and the first row group of a parquet file of ``size`` bytes to ``path``. ``read`` returns the
    bytes of the file. Of the row group, only ``columns`` are written, or all columns if the file has none of them.
    Return two flags: whether the schema was written, and whether the columns were written. If the schema and the
    _END_BYTES bytes behind it are together more than ``most_bytes`` bytes, nothing is written. If the columns are more
    than ``most_bytes`` bytes, only the schema is written.

    If the places of the columns can't be read, only the schema is written. A reader of a damaged file then raises the
    same error as for the whole file.
    """
    end = read(max(0, size - _END_BYTES), _END_BYTES)
    length = int.from_bytes(end[:4], "little") + _END_BYTES
    if length > most_bytes:
        return False, False
    start = max(0, size - length)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(_MAGIC)
        file.seek(start)
        file.write(read(start, size - start))
    try:
        chunks = first_row_group(path, columns)
    except PlacesUnknownError:
        return True, False
    if sum(length for _, length in chunks) > most_bytes:
        return True, False
    with path.open("r+b") as file:
        for offset, length in chunks:
            file.seek(offset)
            file.write(read(offset, length))
    return True, True
