"""The interface `RunStore`: what the trainer needs of the store that holds a job's runs. `client.py` implements it for
S3-compatible object stores, and `folder/` for a folder of this machine.

`root.py` binds a store to the folder of a job's runs. Model and data in an object store are read with the class `Store`
of `client.py` itself, because only an object store states tags and digests of the content of its objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol


class ListedObject(NamedTuple):
    """An object as a listing shows it."""

    key: str
    bytes: int
    modified: datetime
    etag: str = ""

    @property
    def tag(self) -> str:
        """Size and ETag as one text. Where the store sends ETags, the texts of two objects with different contents
        differ."""
        return f"{self.bytes} {self.etag}"


@dataclass(frozen=True)
class ObjectDigest:
    """Size in bytes and sha256 of an object or a local file."""

    bytes: int
    sha256: str


def digest_of_file(path: Path) -> ObjectDigest:
    """Return the size and sha256 of a local file."""
    with path.open("rb") as file:
        return ObjectDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class RunStore(Protocol):
    """A store of objects. A bucket and a key name an object, for example `finetune` and `runs/000001.json`. Slashes
    separate the parts of a key.

    Every object is there as a whole or not at all, also after a crash in the middle of a write. What a method wrote has
    reached the store's disk when the method returns. Several processes may use a store at the same time, each from
    several threads.

    The methods that access the store raise OutsideFailure if the store fails for longer than the time budget. After an
    error that usually lasts they raise it at once.
    """

    @property
    def field(self) -> str:
        """Path of the field in the run file that names the store, for example `storage.endpoint`."""

    @property
    def endpoint(self) -> str:
        """The store for messages, for example `http://minio.minio.svc:9000` or `/home/user/runs`."""

    def address(self, bucket: str, key: str) -> str:
        """Return where people find the object, or the folder of objects, that is named ``key``."""

    def with_budget(self, seconds: float) -> RunStore:
        """Return a copy of this store with another time budget for repeating failed requests."""

    def for_background(self, seconds: float, on_attempt: Callable[[str], None]) -> RunStore:
        """Return a copy of this store for background work. The copy repeats a failed request until ``seconds`` have
        passed, also after errors that usually last, because people can correct these errors meanwhile.

        ``on_attempt`` is called with the error message after each failed request, and with an empty text when a
        repeated request succeeds.
        """

    def telling(self, on_attempt: Callable[[str], None]) -> RunStore:
        """Return a copy of this store that calls ``on_attempt`` as `for_background` says, and not after an error for
        which a request is not repeated."""

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return the bytes of an object, or None if the object does not exist."""

    def read_range(self, bucket: str, key: str, start: int, length: int) -> bytes | None:
        """Return ``length`` bytes of an object from offset ``start`` on, or fewer if the object ends before. Return
        None if the object does not exist."""

    def download(self, bucket: str, key: str, path: Path) -> ObjectDigest | None:
        """Write an object to the local file ``path`` and return its size and sha256, or None if the object does not
        exist."""

    def list_objects(self, bucket: str, prefix: str) -> list[ListedObject]:
        """Return all objects whose keys begin with ``prefix``, ordered by key."""

    def list_folders(self, bucket: str, prefix: str, most: int) -> list[str]:
        """Return the names of the first ``most`` folders directly below ``prefix``, which ends with a slash. A folder
        exists as long as an object lies below it."""

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Create or replace an object."""

    def upload(self, bucket: str, key: str, path: Path) -> ObjectDigest:
        """Create or replace an object with the content of the local file ``path``, and return its size and sha256."""

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        """Create an object unless the key exists. Return whether the object now has the content ``data``. Of several
        processes that create the same object at the same time, exactly one succeeds."""

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects. A key that does not exist is no error."""

    def abort_multipart_uploads(self, bucket: str, prefix: str) -> list[str]:
        """Remove what is left of unfinished uploads below ``prefix``, which ends with a slash. Return their keys."""
