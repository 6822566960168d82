"""Keys in the object store: where runs, checkpoints, metrics and artifacts lie below a run's root.

<uri>/<namespace>/<name>/<runId>/
  runs/<run>.json                 taken with If-None-Match: the run number is the fence
  metrics/<run>-<segment>.jsonl   every step, immutable segments
  checkpoints/<run>-<step>/       files, manifest.json, COMMIT last
  artifacts/<run>/                files, manifest.json, COMMIT last
  evaluation/<run>.json
  preflight/<token>               written, read back and deleted by a preflight check
  ARTIFACT                        pointer with If-None-Match: the first one wins
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
BASES = "_bases"
"""Folder beside the namespaces (none can have this name) that holds base models with added tokens, each once."""


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
    """Split `s3://bucket/prefix`; raises UserError for anything else."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if match is None:
        raise UserError(uri, "must be an address of the form s3://bucket/key")
    return Location(match[1], match[2].strip("/"))


def run_root(storage_uri: str, namespace: str, name: str, run_id: str) -> str:
    """Return the root of a run in the bucket."""
    return parse_uri(storage_uri).uri(namespace, name, run_id)


def run_root_of(job: FineTuneJob) -> str:
    """SHORT"""
    storage, metadata = job.spec.storage, job.metadata
    return run_root(storage.uri, metadata.namespace, metadata.name, storage.run_id or metadata.uid)


def run_key(run: int) -> str:
    """Return the key of a run's record, below the root."""
    return f"runs/{run:06d}.json"


def checkpoint_folder(run: int, step: int) -> str:
    """Return the folder of a checkpoint, below the root."""
    return f"checkpoints/{run:06d}-{step:09d}"


def artifact_folder(run: int) -> str:
    """Return the folder of a run's artifact, below the root."""
    return f"artifacts/{run:06d}"


def metrics_key(run: int, segment: int) -> str:
    """Return the key of a segment of the step log, below the root."""
    return f"metrics/{run:06d}-{segment:06d}.jsonl"


def evaluation_key(run: int) -> str:
    """Return the key of a run's scores, below the root."""
    return f"evaluation/{run:06d}.json"


def probe_key(token: str) -> str:
    """Return the key of the object that a preflight check writes, reads and deletes, below the root."""
    return f"preflight/{token}"


class ManifestFile(ContractModel):
    """A file of a checkpoint or an artifact."""

    name: str
    bytes: int
    sha256: str


class Manifest(ContractModel):
    """What a checkpoint or an artifact consists of; COMMIT holds the sha256 of its bytes."""

    version: int = 1
    kind: str
    """Checkpoint or Artifact."""
    run: int
    step: int
    files: list[ManifestFile]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def encode(self) -> bytes:
        """Return the bytes that are stored and digested."""
        return self.to_json().encode()


class ArtifactPointer(ContractModel):
    """Content of ARTIFACT: which artifact is the run's."""

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
