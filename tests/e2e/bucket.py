"""Functions that read the objects that the runs of a job have written into the bucket. Tests compare these objects with
the job's status."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from minio import Minio

from examples.demo import steps
from finetune_core.api.job import FineTuneJob
from finetune_core.layout import ARTIFACT_POINTER, COMMIT, MANIFEST, Manifest, parse_uri
from tests.cluster import Cluster


@dataclass(frozen=True)
class Folder:
    """A committed checkpoint or artifact: the key of its folder, relative to the folder of all runs, such as
    ``"checkpoints/000001-000000120"``, and its manifest."""

    name: str
    manifest: Manifest


class RunFolder:
    """The folder in the bucket that holds all runs of one job: `<storage.uri>/<namespace>/<name>/<runId>`. Call the
    methods inside ``cluster.enter()``."""

    def __init__(self, cluster: Cluster, uri: str) -> None:
        """Prepare to read the folder ``uri`` with MinIO's administrator keys."""
        self._store: Minio = steps.object_store(cluster)
        self._root = parse_uri(uri)

    def keys(self, prefix: str = "") -> list[str]:
        """Return, sorted, the keys of all objects below ``prefix``. Prefix and keys are relative to this folder."""
        start = self._root.key(prefix)
        found = self._store.list_objects(self._root.bucket, start, recursive=True)
        return sorted(str(entry.object_name).removeprefix(self._root.prefix + "/") for entry in found)

    def times(self, prefix: str = "") -> dict[str, datetime]:
        """Return the time at which each object below ``prefix`` was written, by the object's key. The times are whole
        seconds. Prefix and keys are relative to this folder."""
        start = self._root.key(prefix)
        found = self._store.list_objects(self._root.bucket, start, recursive=True)
        keys = {str(entry.object_name).removeprefix(self._root.prefix + "/"): entry.last_modified for entry in found}
        return {key: at for key, at in keys.items() if at is not None}

    def read(self, key: str) -> bytes:
        """Return the content of the object ``key``, which is relative to this folder."""
        response = self._store.get_object(self._root.bucket, self._root.key(key))
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

    def verified(self, kind: str) -> list[Folder]:
        """Return all committed folders of one ``kind``, which is `checkpoints` or `artifacts`. Assert that the size and
        sha256 of every file in these folders equal those in the manifest of its folder."""
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
        """Return the parsed object `runs/<number>.json` of every run, ordered by the number of the run."""
        return [json.loads(self.read(key)) for key in self.keys("runs/")]

    def steps_logged(self) -> list[tuple[int, int]]:
        """Return a pair (run, step) for every line of the step log, in the order of the log."""
        rows = []
        for key in self.keys("metrics/"):
            run = int(key.split("/")[-1].split("-")[0])
            rows += [(run, json.loads(line)["step"]) for line in self.read(key).splitlines()]
        return rows

    def losses(self) -> dict[int, float]:
        """Return the loss of every step, by the number of the step. For a step that was trained in several runs, return
        the loss in the last of these runs."""
        losses: dict[int, float] = {}
        for key in self.keys("metrics/"):
            for line in self.read(key).splitlines():
                row = json.loads(line)
                losses[row["step"]] = row["loss"]
        return losses

    def pointer(self) -> dict[str, Any]:
        """Return the parsed object ARTIFACT. It contains the folder of the job's artifact, and the sha256 of the
        artifact's manifest."""
        pointer: dict[str, Any] = json.loads(self.read(ARTIFACT_POINTER))
        return pointer


def run_folder(cluster: Cluster, namespace: str, job: FineTuneJob) -> RunFolder:
    """Return the folder of all runs of ``job`` in the bucket. The job's spec must not set `storage.runId`, because the
    function assumes that the folder is named after the job's uid."""
    return RunFolder(cluster, f"s3://{steps.BUCKET}/runs/{namespace}/{job.metadata.name}/{job.metadata.uid}")
