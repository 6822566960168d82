"""The folder of a job's runs in the bucket, together with the access to its store. All modules of the trainer
that read or write this folder use `RunRoot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_core.contract import RunConfig
from finetune_core.layout import Location, parse_uri
from finetune_trainer.pod.settings import Paths
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.run_store import ListedObject, ObjectDigest, RunStore


@dataclass(frozen=True)
class RunRoot:
    """The folder of a job's runs: the prefix `<uri>/<namespace>/<name>/<runId>` in a store. Keys in the methods are
    relative to this prefix."""

    store: RunStore
    location: Location

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if the object does not exist."""
        return self.store.read(self.location.bucket, self.location.key(key))

    def read_at_most(self, key: str, limit: int) -> bytes | None:
        """Return an object's bytes, or None if the object does not exist or has more than ``limit`` bytes."""
        data = self.store.read_range(self.location.bucket, self.location.key(key), 0, limit + 1)
        return data if data is not None and len(data) <= limit else None

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        self.store.write(self.location.bucket, self.location.key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object unless the key exists. Return whether the object now has the content ``data`` (see
        `RunStore.create`)."""
        return self.store.create(self.location.bucket, self.location.key(key), data)

    def upload(self, key: str, path: Path) -> ObjectDigest:
        """Create or replace an object with the content of the local file ``path``, and return its size and sha256."""
        return self.store.upload(self.location.bucket, self.location.key(key), path)

    def download(self, key: str, path: Path) -> ObjectDigest | None:
        """Write an object to the local file ``path`` and return its size and sha256, or None if the object does not
        exist."""
        return self.store.download(self.location.bucket, self.location.key(key), path)

    def list_objects(self, folder: str) -> list[ListedObject]:
        """Return all objects below ``folder``, for example `checkpoints/`. Their keys are relative to the prefix."""
        start = len(self.location.key("")) + 1 if self.location.prefix else 0
        found = self.store.list_objects(self.location.bucket, self.location.key(folder))
        return [entry._replace(key=entry.key[start:]) for entry in found]

    def delete(self, keys: list[str]) -> None:
        """Delete objects. A key that does not exist is no error."""
        self.store.delete(self.location.bucket, [self.location.key(key) for key in keys])

    def abort_multipart_uploads(self) -> list[str]:
        """Remove what is left of unfinished uploads below the prefix, and return their full keys in the bucket."""
        return self.store.abort_multipart_uploads(self.location.bucket, self.location.key("") + "/")

    def for_background(self, seconds: float, on_attempt: Callable[[str], None]) -> RunRoot:
        """Return the same folder, with a store for background work. `RunStore.for_background` describes the
        parameters."""
        return RunRoot(self.store.for_background(seconds, on_attempt), self.location)

    def telling(self, on_attempt: Callable[[str], None]) -> RunRoot:
        """Return the same folder, with a store that tells its failed requests. See `RunStore.telling`."""
        return RunRoot(self.store.telling(on_attempt), self.location)

    def uri(self, key: str) -> str:
        """Return the address of a key: `s3://…`, or its path where the store is a folder of this machine."""
        return self.store.address(self.location.bucket, self.location.key(key))


def open_root(config: RunConfig, paths: Paths) -> RunRoot:
    """Return the folder of runs that the run file names, with access to its store. No request is sent."""
    storage = config.storage
    store = FolderStore.at(Path(storage.folder)) if storage.folder is not None else object_store(config, paths)
    return RunRoot(store, parse_uri(storage.uri))


def source_store(root: RunRoot, config: RunConfig, paths: Paths) -> Store:
    """Return access to the object store of models and data whose source is `s3`. No request is sent. ``root`` is what
    `open_root` returned: the same object store, unless the runs lie in a folder of this machine."""
    return root.store if isinstance(root.store, Store) else object_store(config, paths)


def object_store(config: RunConfig, paths: Paths) -> Store:
    """Return access to the object store that the run file names. No request is sent."""
    storage = config.storage
    return Store(
        storage.endpoint,
        storage.region,
        paths.credentials if storage.credentials == "Secret" else None,
        addressing=storage.addressing,
        encryption=storage.encryption,
        ca_file=paths.storage_ca_file if paths.storage_ca_file.is_file() else None,
    )
