"""The index of a data source with several files: a JSON file in a folder that names the local files in their order. The
room `sources` writes the index, and `reader.py` reads it."""

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
    """Whether the local file is only the beginning of the data file."""


def write_index(folder: Path, files: Sequence[DataFile]) -> None:
    """Write the index of ``files`` into the existing ``folder``."""
    # Names from a volume may hold bytes that are no UTF-8 (os.fsencode), so paths are stored as they are escaped.
    entries = [
        {"path": os.fspath(file.path), "name": file.name, "place": file.place, "is_head": file.is_head}
        for file in files
    ]
    (folder / INDEX_FILE).write_text(json.dumps(entries))


def read_index(folder: Path) -> list[DataFile]:
    """Return the files in the index of ``folder``."""
    entries = json.loads((folder / INDEX_FILE).read_text())
    return [DataFile(Path(entry["path"]), entry["name"], entry["place"], entry["is_head"]) for entry in entries]
