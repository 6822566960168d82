"""The root of one run in the bucket: every key of the layout is read and written below it through this class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_core.contract import RunConfig
from finetune_core.layout import Location, parse_uri
from finetune_trainer.pod.settings import Paths
from finetune_trainer.storage.client import ListedObject, ObjectDigest, Store


@dataclass(frozen=True)
class RunRoot:
    """`<uri>/<namespace>/<name>/<runId>` with the store that it lies in; keys are relative to it."""

    store: Store
    location: Location

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, None where it does not exist."""
        return self.store.read(self.location.bucket, self.location.key(key))

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        self.store.write(self.location.bucket, self.location.key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object unless it exists; return whether ``data`` is now its content by this call."""
        return self.store.create(self.location.bucket, self.location.key(key), data)

    def upload(self, key: str, path: Path) -> ObjectDigest:
        """Create or replace an object with a file's content."""
        return self.store.upload(self.location.bucket, self.location.key(key), path)

    def download(self, key: str, path: Path) -> ObjectDigest | None:
        """Write an object to a file; None where it does not exist."""
        return self.store.download(self.location.bucket, self.location.key(key), path)

    def list_objects(self, folder: str) -> list[ListedObject]:
        """Return the objects below ``folder`` (with a slash at its end) with relative keys."""
        start = len(self.location.key("")) + 1 if self.location.prefix else 0
        found = self.store.list_objects(self.location.bucket, self.location.key(folder))
        return [entry._replace(key=entry.key[start:]) for entry in found]

    def delete(self, keys: list[str]) -> None:
        """Delete objects."""
        self.store.delete(self.location.bucket, [self.location.key(key) for key in keys])

    def abort_multipart_uploads(self) -> list[str]:
        """Abort all multipart uploads below the root that nobody finished; return their keys in the bucket."""
        return self.store.abort_multipart_uploads(self.location.bucket, self.location.key("") + "/")

    def for_background(self, seconds: float, on_attempt: Callable[[str], None]) -> RunRoot:
        """Return the same root for work in the background; see `Store.for_background`."""
        return RunRoot(self.store.for_background(seconds, on_attempt), self.location)

    def uri(self, key: str) -> str:
        """Return the `s3://` address of a key."""
        return self.location.uri(key)


def open_run_root(config: RunConfig, paths: Paths) -> RunRoot:
    """Return the run's root in the bucket."""
    storage = config.storage
    store = Store(
        storage.endpoint,
        storage.region,
        paths.credentials if storage.credentials == "Secret" else None,
        addressing=storage.addressing,
        encryption=storage.encryption,
        ca_file=paths.storage_ca_file if paths.storage_ca_file.is_file() else None,
    )
    return RunRoot(store, parse_uri(storage.uri))
