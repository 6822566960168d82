"""The index of a data source with several files: a JSON file in a folder that names the local files in their order. The
package `sources` writes the index, and `reader.py` reads it."""

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
    """Name for messages about the file, for example `train.jsonl`. Its suffixes tell what the file is."""
    place: str = ""
    """Name for messages about rows of the file, for example `s3://bucket/rows/part-1.jsonl`. Empty if the name of the
    data source names the file already."""
    is_head: bool = False
    """Whether the local file is only the beginning of the data file. Of a parquet file that is the schema, and the
    first row group at most."""
    has_rows: bool = True
    """Whether rows of the data file are there. False if only the schema of a parquet file is there."""


def write_index(folder: Path, files: Sequence[DataFile]) -> None:
    """Write the index of ``files`` into the existing ``folder``."""
    # Bytes of a name that are no UTF-8 are half surrogate pairs here (os.fsdecode). JSON escapes them, so no byte is
    # lost.
    entries = [file._asdict() | {"path": os.fspath(file.path)} for file in files]
    (folder / INDEX_FILE).write_text(json.dumps(entries))


def read_index(folder: Path) -> list[DataFile]:
    """Return the files in the index of ``folder``."""
    entries = json.loads((folder / INDEX_FILE).read_text())
    return [DataFile(**entry | {"path": Path(entry["path"])}) for entry in entries]
