"""Keys in the object store: the places of runs, checkpoints, metrics and artifacts below a run's root.

<uri>/<namespace>/<name>/<runId>/
  runs/<run>.json                 created with If-None-Match, so that two trainers never take the same run number
  metrics/<run>-<segment>.jsonl   one row per optimizer step, in immutable segments
  checkpoints/<run>-<step>/       files and manifest.json; COMMIT is written last
  artifacts/<run>/                files and manifest.json; COMMIT is written last
  evaluation/<run>.json           scores
  preflight/<token>               written, read back and deleted by a preflight check
  ARTIFACT                        pointer to the artifact, created with If-None-Match so that the first writer wins
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from finetune_core.api.job import FineTuneJob
from finetune_core.contract import ContractModel, Outcome
from finetune_core.errors import UserError

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
ARTIFACT_POINTER = "ARTIFACT"
TRAINER_FILE = "trainer.json"
"""File of a checkpoint with step, data cursor, perplexity and the other numbers that are not tensors."""
BASES = "_bases"
"""Folder that holds base models with added tokens, each stored once. The folder lies where otherwise folders of
namespaces lie. No namespace can have this name, because names of namespaces have no underscore."""


class Location(NamedTuple):
    """A bucket and a key prefix without slashes at its ends."""

    bucket: str
    prefix: str

    def key(self, *parts: str) -> str:
        """Return the key of ``parts`` below the prefix."""
        return "/".join(part for part in (self.prefix, *parts) if part)

    def uri(self, *parts: str) -> str:
        """Return the `s3://` address of ``parts`` below the prefix."""
        return f"s3://{self.bucket}/{self.key(*parts)}"


def parse_uri(uri: str) -> Location:
    """Split `s3://bucket/prefix`. Raises UserError for any other text."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if match is None:
        raise UserError(uri, "must be an address of the form s3://bucket/key")
    return Location(match[1], match[2].strip("/"))


def run_root(storage_uri: str, namespace: str, name: str, run_id: str) -> str:
    """Return the `s3://` address of a run's root, for example `s3://finetune/runs/team-a/quickstart/<runId>`."""
    return parse_uri(storage_uri).uri(namespace, name, run_id)


def run_root_of(job: FineTuneJob) -> str:
    """Return the `s3://` address of the root of ``job``'s run. Without `storage.runId` the job's uid names the run."""
    storage, metadata = job.spec.storage, job.metadata
    return run_root(storage.uri, metadata.namespace, metadata.name, storage.run_id or metadata.uid)


def run_key(run: int) -> str:
    """Return the key of a run's record, relative to the run's root."""
    return f"runs/{run:06d}.json"


def checkpoint_folder(run: int, step: int) -> str:
    """Return the folder of a checkpoint, relative to the run's root: `checkpoints/000001-000000120`."""
    return f"checkpoints/{run:06d}-{step:09d}"


def artifact_folder(run: int) -> str:
    """Return the folder of a run's artifact, relative to the run's root."""
    return f"artifacts/{run:06d}"


def metrics_key(run: int, segment: int) -> str:
    """Return the key of a segment of the step log, relative to the run's root."""
    return f"metrics/{run:06d}-{segment:06d}.jsonl"


def evaluation_key(run: int) -> str:
    """Return the key of a run's scores, relative to the run's root."""
    return f"evaluation/{run:06d}.json"


def probe_key(token: str) -> str:
    """Return the key of the object that a preflight check writes, reads and deletes, relative to the run's root."""
    return f"preflight/{token}"


class ManifestFile(ContractModel):
    """A file of a checkpoint or an artifact: its name in the folder, its size, and its sha256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Manifest(ContractModel):
    """The list of files in a checkpoint or an artifact. The object COMMIT in the same folder holds the sha256 of the
    manifest's bytes."""

    version: int = 1
    kind: str
    """`Checkpoint` or `Artifact`."""
    run: int
    step: int
    files: list[ManifestFile]

    @property
    def total_bytes(self) -> int:
        """Size of all files together in bytes."""
        return sum(file.bytes for file in self.files)

    def encode(self) -> bytes:
        """Return the bytes that are stored, and whose sha256 COMMIT holds."""
        return self.to_json().encode()


class ArtifactPointer(ContractModel):
    """Content of the object ARTIFACT, which names the folder of the run's only artifact."""

    version: int = 1
    run: int
    step: int
    folder: str
    bytes: int
    manifest_sha256: str
    outcome: Outcome = Outcome.COMPLETED


def digest(data: bytes) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
