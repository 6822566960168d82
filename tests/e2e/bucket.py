"""Reads what a run left in the bucket, as a person who distrusts the status would."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from minio import Minio

from examples.demo import steps
from finetune_core.layout import ARTIFACT_POINTER, COMMIT, MANIFEST, Manifest, parse_uri
from tests.cluster import Cluster


@dataclass(frozen=True)
class Folder:
    """A committed checkpoint or artifact."""

    name: str
    manifest: Manifest


class RunFolder:
    """The root of one run: `<storage.uri>/<namespace>/<name>/<runId>`. Use it inside ``cluster.enter()``."""

    def __init__(self, cluster: Cluster, uri: str) -> None:
        """Look at ``uri`` with the administrator's keys."""
        self._store: Minio = steps.object_store(cluster)
        self._root = parse_uri(uri)

    def keys(self, prefix: str = "") -> list[str]:
        """Return all keys below ``prefix``, relative to the root, sorted."""
        start = self._root.key(prefix)
        found = self._store.list_objects(self._root.bucket, start, recursive=True)
        return sorted(str(entry.object_name).removeprefix(self._root.prefix + "/") for entry in found)

    def times(self, prefix: str = "") -> dict[str, datetime]:
        """Return when each object below ``prefix`` was written, by its key, to the second."""
        start = self._root.key(prefix)
        found = self._store.list_objects(self._root.bucket, start, recursive=True)
        keys = {str(entry.object_name).removeprefix(self._root.prefix + "/"): entry.last_modified for entry in found}
        return {key: at for key, at in keys.items() if at is not None}

    def read(self, key: str) -> bytes:
        """Return the bytes of an object."""
        response = self._store.get_object(self._root.bucket, self._root.key(key))
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

    def verified(self, kind: str) -> list[Folder]:
        """Return the committed folders below ``kind`` (checkpoints, artifacts); asserts every byte of them."""
        folders = []
        for key in self.keys(f"{kind}/"):
            folder, _, file = key.rpartition("/")
            if file != COMMIT:
                continue
            manifest = Manifest.model_validate_json(self.read(f"{folder}/{MANIFEST}"))
            for entry in manifest.files:
                data = self.read(f"{folder}/{entry.name}")
                assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256), entry.name
            folders.append(Folder(folder, manifest))
        return folders

    def runs(self) -> list[dict[str, Any]]:
        """Return the records of all runs, in order."""
        return [json.loads(self.read(key)) for key in self.keys("runs/")]

    def steps_logged(self) -> list[tuple[int, int]]:
        """Return (run, step) of every line of the step log, in order."""
        rows = []
        for key in self.keys("metrics/"):
            run = int(key.split("/")[-1].split("-")[0])
            rows += [(run, json.loads(line)["step"]) for line in self.read(key).splitlines()]
        return rows

    def pointer(self) -> dict[str, Any]:
        """Return what ARTIFACT names."""
        pointer: dict[str, Any] = json.loads(self.read(ARTIFACT_POINTER))
        return pointer
