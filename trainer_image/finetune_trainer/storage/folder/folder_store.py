"""The class `FolderStore`: a folder of this machine as the store of a job's runs. `storage/root.py` creates it.

An object is a file. It is written beside its place, and renamed when its content is on the disk. An object that must
not replace another one is linked to its place instead, because `link` fails where the name exists. Several processes
may use the same folder at the same time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from finetune_trainer.pod.settings import STORE_BUDGET_SECONDS
from finetune_trainer.storage.folder.folder_entries import (
    PARTIAL,
    Placing,
    checked_parts,
    delete_files,
    opened_file,
    opened_folder,
    put_file,
    refuse_foreign,
    write_all,
)
from finetune_trainer.storage.folder.folder_errors import NO_HARD_LINKS, explained, no_hard_links
from finetune_trainer.storage.retries import Retries
from finetune_trainer.storage.run_store import ListedObject, ObjectDigest
from finetune_trainer.storage.store_errors import writing

T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
LATEST_SECONDS = 7_000 * 365 * 86_400
"""Files with times before 1970, or later than this many seconds after it, are listed with the nearest time that is not.
The record of a checkpoint can't have other times."""


class _Entry(NamedTuple):
    """A file below a folder of the store."""

    name: str
    """Path relative to the folder."""
    status: os.stat_result


@dataclass(frozen=True)
class FolderStore:
    """The store of a job's runs in a folder of this machine. `RunStore` says what the methods do."""

    folder: Path
    """The folder, which must exist. Its subfolders are the buckets."""
    retries: Retries
    field = "storage.folder"

    @classmethod
    def at(cls, folder: Path, *, budget_seconds: float = STORE_BUDGET_SECONDS) -> FolderStore:
        """Return the store in ``folder``. Nothing is read or written."""
        return cls(folder, Retries(str(folder), budget_seconds))

    @property
    def endpoint(self) -> str:
        """The path of the folder."""
        return str(self.folder)

    def address(self, bucket: str, key: str) -> str:
        """Return the path of an object, or of a folder of objects."""
        return str(self.folder / bucket / key)

    def with_budget(self, seconds: float) -> FolderStore:
        """Return a copy of this store with another time budget for repeating failed requests."""
        return replace(self, retries=replace(self.retries, budget_seconds=seconds))

    def for_background(self, seconds: float, on_attempt: Callable[[str], None]) -> FolderStore:
        """Return a copy of this store for background work."""
        retries = replace(self.retries, budget_seconds=seconds, retry_refusals=True, on_attempt=on_attempt)
        return replace(self, retries=retries)

    def telling(self, on_attempt: Callable[[str], None]) -> FolderStore:
        """Return a copy of this store that tells its failed requests."""
        return replace(self, retries=replace(self.retries, on_attempt=on_attempt))

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return the bytes of an object, or None if the object does not exist."""
        path, parts = self._object(bucket, key)
        return self._reading(path, parts, lambda file: b"".join(_chunks(file, path)))

    def read_range(self, bucket: str, key: str, start: int, length: int) -> bytes | None:
        """Return ``length`` bytes of an object from offset ``start`` on, or fewer if the object ends before. Return
        None if the object does not exist."""
        path, parts = self._object(bucket, key)

        def get(file: int) -> bytes:
            os.lseek(file, start, os.SEEK_SET)
            return b"".join(_chunks(file, path, length))

        return self._reading(path, parts, get)

    def download(self, bucket: str, key: str, path: Path) -> ObjectDigest | None:
        """Write an object to the local file ``path`` and return its size and sha256, or None if the object does not
        exist."""
        source_path, parts = self._object(bucket, key)

        def get(source: int) -> ObjectDigest:
            hasher, size = hashlib.sha256(), 0
            with writing(path), path.open("wb") as file:
                for chunk in _chunks(source, source_path):
                    hasher.update(chunk)
                    size += file.write(chunk)
            return ObjectDigest(size, hasher.hexdigest())

        return self._reading(source_path, parts, get)

    def list_objects(self, bucket: str, prefix: str) -> list[ListedObject]:
        """Return all objects whose keys begin with ``prefix``, ordered by key."""
        parts, begin = self._folder(bucket, prefix)
        start = prefix.removesuffix(begin)

        def objects() -> list[ListedObject]:
            return sorted(_listed(f"{start}{name}", status) for name, status in self._entries(parts, begin))

        return self._run(self.folder / bucket / prefix, "read", objects)

    def list_folders(self, bucket: str, prefix: str, most: int) -> list[str]:
        """Return the names of the first ``most`` folders directly below ``prefix``, which ends with a slash. A folder
        exists as long as an object lies below it."""
        parts, _ = self._folder(bucket, prefix)

        def folders() -> list[str]:
            with opened_folder(self.folder, parts) as folder:
                names = [entry.name for entry in _scanned(folder) if entry.is_dir(follow_symlinks=False)]
            found: list[str] = []
            # An object store orders the names with the slash behind them.
            for name in sorted(names, key=lambda name: f"{name}/"):
                if len(found) < most and next(self._entries([*parts, name], ""), None) is not None:
                    found.append(name)
            return found

        return self._run(self.folder / bucket / prefix, "read", folders)

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Create or replace an object."""
        path, parts = self._object(bucket, key)
        put = partial(put_file, self.folder, parts, lambda file: write_all(file, data), _rename)
        self._run(path, "written", put)

    def upload(self, bucket: str, key: str, path: Path) -> ObjectDigest:
        """Create or replace an object with the content of the local file ``path``, and return its size and sha256."""
        target, parts = self._object(bucket, key)

        def copy(file: int) -> ObjectDigest:
            hasher, size = hashlib.sha256(), 0
            source.seek(0)
            for chunk in _chunks(source.fileno(), path):
                hasher.update(chunk)
                write_all(file, chunk)
                size += len(chunk)
            return ObjectDigest(size, hasher.hexdigest())

        with path.open("rb", buffering=0) as source:
            put = partial(put_file, self.folder, parts, copy, _rename)
            digest, _ = self._run(target, "written", put)
        return digest

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        """Create an object unless the key exists. Return whether the object now has the content ``data``."""
        path, parts = self._object(bucket, key)
        put = partial(put_file, self.folder, parts, lambda file: write_all(file, data), self._link)
        _, is_new = self._run(path, "written", put)
        return is_new or self.read(bucket, key) == data

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects. A key that does not exist is no error. A folder in which nothing is left is deleted too."""
        by_folder: dict[tuple[str, ...], list[str]] = {}
        for key in keys:
            _, (*folder, name) = self._object(bucket, key)
            by_folder.setdefault(tuple(folder), []).append(name)
        for parts, names in by_folder.items():
            self._run(self.folder.joinpath(*parts), "changed", partial(delete_files, self.folder, parts, names))

    def abort_multipart_uploads(self, bucket: str, prefix: str) -> list[str]:
        """Delete the unfinished files below ``prefix``, which ends with a slash, and return their keys. If one of them
        is still being written, its writer notices that it is gone, and writes it again."""
        parts, _ = self._folder(bucket, prefix)

        def remove() -> list[str]:
            names = [name for name, _ in self._entries(parts, "", unfinished=True)]
            for name in names:
                *below, last = name.split("/")
                delete_files(self.folder, [*parts, *below], [last])
            return [f"{prefix}{name}" for name in names]

        return self._run(self.folder / bucket / prefix, "changed", remove)

    def _object(self, bucket: str, key: str) -> tuple[Path, list[str]]:
        """Return the path of an object, and the parts of the path below the folder of the store."""
        parts = checked_parts(self.folder, [bucket, *key.split("/")])
        return self.folder.joinpath(*parts), parts

    def _folder(self, bucket: str, prefix: str) -> tuple[list[str], str]:
        """Return the parts of the path of the innermost folder that ``prefix`` names, and the text with which the names
        in this folder must begin."""
        *folders, begin = prefix.split("/")
        return checked_parts(self.folder, [bucket, *folders]), begin

    def _run(self, path: Path, doing: str, request: Callable[[], T]) -> T:
        """Call ``request`` until it succeeds, as `Retries` does. ``path`` and ``doing`` are for the sentence about an
        error (see `explained`)."""

        def attempt() -> T:
            with explained(path, doing):
                return request()

        return self.retries.run(attempt, "")

    def _reading(self, path: Path, parts: Sequence[str], get: Callable[[int], T]) -> T | None:
        """Open an object and return what ``get`` returns for its file descriptor, or None if the object does not
        exist."""

        def request() -> T | None:
            with opened_file(self.folder, parts) as file:
                return get(file) if file is not None else None

        return self._run(path, "read", request)

    def _link(self, placing: Placing) -> bool:
        """Put a file to its place unless there is one already. Return whether this was done."""
        folder = placing.folder
        try:
            os.link(placing.partial, placing.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in NO_HARD_LINKS:
                raise no_hard_links(self.folder, error) from error
            raise
        return True

    def _entries(self, parts: Sequence[str], begin: str, *, unfinished: bool = False) -> Iterator[_Entry]:
        """Yield the files in the folder that ``parts`` lead to, at any depth, if their names in this folder begin with
        ``begin``. With ``unfinished``, the files that are being written are yielded instead of the objects."""
        waiting = [""]
        while waiting:
            below = waiting.pop()
            inner = [*parts, *below.split("/")[:-1]]
            with opened_folder(self.folder, inner) as folder:
                for entry in _scanned(folder):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    is_partial = entry.name.startswith(PARTIAL)
                    if not below and not entry.name.startswith(begin):
                        continue
                    refuse_foreign(self.folder.joinpath(*inner, entry.name), status.st_mode)
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(f"{below}{entry.name}/")
                    elif is_partial == unfinished:
                        yield _Entry(f"{below}{entry.name}", status)


def _chunks(file: int, path: Path, length: int | None = None) -> Iterator[bytes]:
    """Yield the next bytes of a file: ``length`` bytes, or all to its end. ``path`` is for the sentence about an
    error."""
    left = length
    while left is None or left > 0:
        with explained(path, "read"):
            chunk = os.read(file, CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
        if not chunk:
            return
        left = left - len(chunk) if left is not None else None
        yield chunk


def _scanned(folder: int | None) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder. A folder that does not exist has none."""
    if folder is not None:
        with os.scandir(folder) as entries:
            yield from entries


def _listed(key: str, status: os.stat_result) -> ListedObject:
    seconds = min(max(status.st_mtime, 0), LATEST_SECONDS)
    return ListedObject(key, status.st_size, datetime.fromtimestamp(seconds, UTC))


def _rename(placing: Placing) -> bool:
    """Put a file to its place, whether or not there is one already."""
    folder = placing.folder
    os.rename(placing.partial, placing.name, src_dir_fd=folder, dst_dir_fd=folder)
    return True
