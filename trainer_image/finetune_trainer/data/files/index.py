"""The index of a data source: a JSON file in a folder that names the local files of the source in their order. The
package `sources` and the preflight check write the index, and `reader.py` reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

INDEX_FILE = "files.json"


class DataFile(NamedTuple):
    """A data file on this machine."""

    path: Path
    name: str
    """Name for messages about the file, for example `train.jsonl`. Its suffixes say of which kind the file is."""
    place: str = ""
    """Name for messages about rows of the file, for example `s3://bucket/rows/part-1.jsonl`. Empty if the name
    of the data source names the file already. Such messages then have the name of the data source."""
    is_head: bool = False
    """Whether the local file is only the beginning of the data file. The beginning of a parquet file is its schema,
    with or without the first row group."""
    has_rows: bool = True
    """Whether the local file has rows. False if it has only the schema of a parquet file."""


def write_index(folder: Path, files: Sequence[DataFile]) -> None:
    """Write the index of ``files`` into the existing ``folder``."""
    # In a path as text, a byte that is no UTF-8 is half of a surrogate pair (os.fsdecode). JSON escapes such a
    # character, so no byte of the path is lost.
    entries = [file._asdict() | {"path": os.fspath(file.path)} for file in files]
    (folder / INDEX_FILE).write_text(json.dumps(entries))


def read_index(folder: Path) -> list[DataFile]:
    """Return the files in the index of ``folder``."""
    entries = json.loads((folder / INDEX_FILE).read_text())
    return [DataFile(**entry | {"path": Path(entry["path"])}) for entry in entries]
