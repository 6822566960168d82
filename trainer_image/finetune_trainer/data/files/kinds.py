"""The kinds of data files and their compressions. The suffixes of a file's name determine both: `rows.jsonl.gz` has
JSON lines, compressed with gzip. `reader.py` and the package `sources` call `kind_of`."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """A kind of data files. The value is the suffix of their names."""

    JSON_LINES = ".jsonl"
    JSON = ".json"
    CSV = ".csv"
    TSV = ".tsv"
    PARQUET = ".parquet"
    TEXT = ".txt"


class Compression(StrEnum):
    """A compression of data files. The value is the suffix that follows the suffix of the kind."""

    NONE = ""
    GZIP = ".gz"
    ZSTANDARD = ".zst"


KINDS_TEXT = f"{', '.join(list(Kind)[:-1])} or {list(Kind)[-1]}, each also with .gz or .zst behind it"
"""The suffixes of data files, as a phrase for messages."""


class FileKind(NamedTuple):
    """Kind and compression of a data file, as the suffixes of its name say."""

    kind: Kind
    compression: Compression
    stem: str
    """The name without the suffix of the compression. Two files with equal stems seem to hold the same rows."""


def kind_of(name: str) -> FileKind | None:
    """Return the kind of the file called ``name``, or None if the name has no suffix of a data file. Case is
    ignored."""
    lower = name.lower()
    compression = next((found for found in Compression if found and lower.endswith(found)), Compression.NONE)
    stem = name[: len(name) - len(compression)]
    kind = next((found for found in Kind if stem.lower().endswith(found)), None)
    return FileKind(kind, compression, stem) if kind is not None else None
