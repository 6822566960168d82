"""The keys under which the trainer stores a job's run records, step logs, checkpoints, scores and artifacts in the
object store.

All keys of a job lie in one folder, the folder of all runs of the job:

<uri>/<namespace>/<name>/<runId>/
  runs/<run>.json                 record of a run: which job began it, what it trains, the checkpoint that it resumed
                                  from; created with If-None-Match, so that no two runs take the same number
  metrics/<run>-<segment>.jsonl   step log: one row per optimizer step, in files (segments) that never change
  checkpoints/<run>-<step>/       files and manifest.json; COMMIT is written last
  artifacts/<run>/                files and manifest.json; COMMIT is written last
  evaluation/<run>.json           scores of base model and tuned model, and their first answers
  settings/<run>.json             the run file of the run, which has all settings and no secrets
  model-digests/<digest>.json     sha256 of a model file whose source states no digest of the content; only with
                                  `storage.cache.claimName`
  preflight/<token>               written, read back and deleted by a preflight check
  ARTIFACT                        names the job's artifact; created with If-None-Match, so that the first writer wins
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import PreflightStatus
from finetune_core.contract import AdapterOrigin, ContractModel, Outcome
from finetune_core.errors import UserError

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
ARTIFACT_POINTER = "ARTIFACT"
TRAINER_FILE = "trainer.json"
"""Name of the file in a checkpoint that contains everything except tensors: the step, the position in the data, the
perplexity and other values."""
MODEL_DIGESTS = "model-digests"
"""Name of the folder, below the folder of all runs of a job, with the sha256 of model files."""
BASES = "_bases"
"""Name of the folder, directly below `storage.uri`, with the extended base models: copies of base models with embedding
rows for `model.addedTokens`, with an untied output head, or with an adapter that was merged into them. Each copy is
stored once for all jobs. All other folders directly below `storage.uri` are named after namespaces. No namespace has
the name of this folder, because the name of a namespace has no underscore."""
LOCAL_RUN = "local"
"""Name of the folder of the runs that `finetune run` makes of a job without `storage.runId`. A training that is begun
anew beside them has `local-2`, and so on."""


class Location(NamedTuple):
    """A folder in the object store: the bucket, and the prefix of the keys in the folder, without a slash at either
    end."""

    bucket: str
    prefix: str

    def key(self, *parts: str) -> str:
        """Return the key that consists of the prefix and ``parts``, joined with slashes."""
        return "/".join(part for part in (self.prefix, *parts) if part)

    def uri(self, *parts: str) -> str:
        """Return the `s3://` address that consists of bucket, prefix and ``parts``, joined with slashes."""
        return f"s3://{self.bucket}/{self.key(*parts)}"


def parse_uri(uri: str) -> Location:
    """Return the bucket and the prefix in an address `s3://bucket/prefix`. Raises UserError for any other text."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if match is None:
        raise UserError(uri, "must be an address of the form s3://bucket/key")
    return Location(match[1], match[2].strip("/"))


def run_root(storage_uri: str, namespace: str, name: str, run_id: str) -> str:
    """Return the `s3://` address of the folder of all runs of a job, for example
    `s3://finetune/runs/team-a/quickstart/<runId>`."""
    return parse_uri(storage_uri).uri(namespace, name, run_id)


def runs_folder_of(job: FineTuneJob) -> str:
    """Return the `s3://` address of the folder that contains the folders of all jobs with the namespace and name of
    ``job``, for example `s3://finetune/runs/team-a/quickstart`. Each of these folders contains all runs of a job."""
    return parse_uri(job.spec.storage.uri).uri(job.metadata.namespace, job.metadata.name)


def run_root_of(job: FineTuneJob, preflight: PreflightStatus | None = None) -> str:
    """Return the `s3://` address of the folder of all runs of ``job``.

    The last part of the address is `storage.runId` if the job sets that field. Otherwise it is the name of a former
    job's folder if ``preflight``, the record of the preflight check, says that the job takes over that folder.
    Otherwise it is the job's uid.
    """
    storage, metadata = job.spec.storage, job.metadata
    taken_over = preflight.taken_over.run_id if preflight is not None and preflight.taken_over is not None else None
    run_id = storage.run_id or taken_over or metadata.uid
    return run_root(storage.uri, metadata.namespace, metadata.name, run_id)


def run_key(run: int) -> str:
    """Return the key of the record of run number ``run``, relative to the folder of all runs of the job."""
    return f"runs/{run:06d}.json"


def checkpoint_folder(run: int, step: int) -> str:
    """Return the folder of a checkpoint, relative to the folder of all runs of the job, for example
    `checkpoints/000001-000000120`."""
    return f"checkpoints/{run:06d}-{step:09d}"


def artifact_folder(run: int) -> str:
    """Return the folder of the artifact that run number ``run`` writes, relative to the folder of all runs of the
    job."""
    return f"artifacts/{run:06d}"


def metrics_key(run: int, segment: int) -> str:
    """Return the key of one file (segment) of the step log, relative to the folder of all runs of the job."""
    return f"metrics/{run:06d}-{segment:06d}.jsonl"


def evaluation_key(run: int) -> str:
    """Return the key of the scores that run number ``run`` wrote, relative to the folder of all runs of the job. The
    base model's scores among them may come from an earlier run."""
    return f"evaluation/{run:06d}.json"


def settings_key(run: int) -> str:
    """Return the key of the settings of run number ``run``, relative to the folder of all runs of the job. The object
    is the run file with which the run began."""
    return f"settings/{run:06d}.json"


def probe_key(token: str) -> str:
    """Return the key of the object that a preflight check writes, reads and deletes as a test of the store. The key is
    relative to the folder of all runs of the job."""
    return f"preflight/{token}"


class ManifestFile(ContractModel):
    """A file of a checkpoint, an artifact or an extended base model: its name in the folder, its size, and its sha256
    in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Manifest(ContractModel):
    """The list of the files of a checkpoint, an artifact or an extended base model. The object COMMIT in the same
    folder holds the sha256 of the stored manifest."""

    version: int = 1
    kind: str
    """What the files make up: `Checkpoint`, `Artifact` or `Base` (an extended base model)."""
    run: int
    step: int
    files: list[ManifestFile]
    adapter: AdapterOrigin | None = None
    """The adapter that the model of an artifact grew from. None without one."""

    @property
    def total_bytes(self) -> int:
        """Size of all files together in bytes."""
        return sum(file.bytes for file in self.files)

    def encode(self) -> bytes:
        """Return the bytes of manifest.json. The object COMMIT holds the sha256 of these bytes."""
        return self.to_json().encode()


class ArtifactPointer(ContractModel):
    """Content of the object ARTIFACT. The object names the folder below `artifacts/` that is the job's artifact,
    because several runs of a job can each write such a folder."""

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


LOCAL_RUN = "local"
"""Id of the runs that `finetune run` makes of a job. A training that is begun anew has `local-2`, and so on."""
