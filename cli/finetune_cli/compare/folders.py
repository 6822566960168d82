"""Reads the folder of all runs of a job: on the local disk, or in the object store. `command.py` opens the folders, and
`compared_run.py` reads them.

Nothing is written, and no link is followed out of a local folder. An object that is too large is treated like one that
can't be read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_cli.bucket.object_store import SMALL_OBJECT_BYTES, MissingError, ObjectStoreReader
from finetune_core.errors import UserError
from finetune_core.layout import Location

MOST_OBJECTS = 200_000
"""Largest number of files of a local folder that are listed. A folder with more files is not the folder of a run."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file below the folder: its key relative to the folder, such as `runs/000001.json`, and its size in bytes."""

    key: str
    bytes: int


class RunFolder(Protocol):
    """The folder of all runs of a job."""

    @property
    def address(self) -> str:
        """Where the folder is, as a person would write it."""

    def list_objects(self) -> list[StoredObject]:
        """Return all files below the folder, sorted by key. Raises UserError where the folder can't be listed."""

    def read(self, key: str) -> bytes | None:
        """Return the content of a file of at most `SMALL_OBJECT_BYTES`. Return None where there is none, or where the
        file is larger. Raises UserError where the store can't be reached."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder on this machine with the same layout as the folder of a job in the bucket."""

    path: Path

    @property
    def address(self) -> str:
        """The path, as it was given."""
        return str(self.path)

    def list_objects(self) -> list[StoredObject]:
        """Return all regular files below the folder."""
        if not self.path.is_dir():
            raise UserError(str(self.path), "must be a folder, and there is none at this path")
        found: list[StoredObject] = []
        for folder, _, names in os.walk(self.path):
            for name in names:
                file = Path(folder) / name
                try:
                    status = file.lstat()
                except OSError:  # deleted since the folder was listed, as a running trainer does with old checkpoints
                    continue
                if not stat.S_ISREG(status.st_mode):
                    continue
                found.append(StoredObject(file.relative_to(self.path).as_posix(), status.st_size))
                if len(found) > MOST_OBJECTS:
                    raise UserError(
                        str(self.path), f"has more than {MOST_OBJECTS:,} files, so it is no folder of a run"
                    )
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes | None:
        """Return the content of a file."""
        file = self.path / key
        try:
            if file.is_symlink() or file.stat().st_size > SMALL_OBJECT_BYTES:
                return None
            return file.read_bytes()
        except OSError:
            return None


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """The folder of a job in the object store."""

    store: ObjectStoreReader
    place: Location

    @property
    def address(self) -> str:
        """The `s3://` address."""
        return self.place.uri()

    def list_objects(self) -> list[StoredObject]:
        """Return all objects below the prefix."""
        prefix = f"{self.place.prefix}/" if self.place.prefix else ""
        found = self.store.entries(self.place.bucket, prefix)
        return [StoredObject(entry.key[len(prefix) :], entry.bytes) for entry in found]

    def read(self, key: str) -> bytes | None:
        """Return the content of an object. `compared_run.py` asks only for objects whose listed size is small."""
        try:
            return self.store.read(self.place.bucket, self.place.key(key))
        except MissingError:
            return None
