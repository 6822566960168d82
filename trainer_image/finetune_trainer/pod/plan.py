"""The worker plan, which the launcher writes to `plan.json` for its worker processes: the content of the run file, the
identity of the attempt, and the local paths of model and data.

`read_run_file` reads the run file, which the operator mounts into the pod. `rendezvous_nonce` and `rendezvous_key`
keep clients that do not belong to the attempt away from its rendezvous store.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import ValidationError

from finetune_core.contract import ContractModel, Identity, RunConfig
from finetune_core.contract.pod import SECRET_ACCESS_KEY
from finetune_core.contract.same_training import TrainingRecord
from finetune_core.errors import UserError
from finetune_trainer.pod.settings import Paths
from finetune_trainer.pod.time_limits import SHORTEST, TimeLimits


class Inputs(ContractModel):
    """Local paths of the folders of base model and adapter, and of the data sources. The path of a data source is a
    folder with an index of its files, or a file."""

    model: Path
    adapter: Path | None = None
    """The adapter of `model.adapter`. None without that field."""
    train: Path
    """The training rows. For `dataset.train.mix` this is the folder that contains all sources."""
    mix: list[Path] = []
    """The sources of `dataset.train.mix`, in their order. Empty without a mix."""
    validation: Path | None = None
    test: Path | None = None
    training: TrainingRecord | None = None
    """What the attempt trains, for the run record. None on all nodes but that of rank 0."""


class WorkerPlan(ContractModel):
    """What a worker process needs to know about its attempt. The rank, the number of ranks and the place where the
    ranks meet are in environment variables instead (see `worker_environments`)."""

    paths: Paths
    identity: Identity
    config: RunConfig
    inputs: Inputs
    folder: Path
    """Temporary folder of the attempt, in which the workers write outcome files, heartbeats, tokenised rows, and the
    files of checkpoints before their upload."""
    time_limits: TimeLimits = SHORTEST
    """How long ranks and pods wait for each other. The limits follow from the sizes of the inputs."""


def read_run_file(path: Path) -> RunConfig:
    """Return the content of the run file. Raises UserError if the file can't be read, or if a field is invalid, for
    example because the file was written for another version of the trainer."""
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"run file {path}", f"can't be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"run file {path}", f"{where}: {first['msg']}") from error


def rendezvous_nonce(identity: Identity, paths: Paths) -> str:
    """Return a text that all pods of an attempt know and that no other attempt has. The prefix of all keys of the
    attempt in the rendezvous store contains the text."""
    nonce = paths.nonce_file.read_text() if paths.nonce_file.is_file() else ""
    parts = f"{identity.uid}/{identity.attempt}/{nonce}"
    return hashlib.sha256(parts.encode()).hexdigest()


def rendezvous_key(identity: Identity, paths: Paths) -> bytes:
    """Return the key by which the pods of an attempt recognise each other.

    The key is made of the nonce of the attempt and of the job's secret access key, if the job has a secret access key.
    Then the right to read the namespace's ConfigMaps and pods is not enough to compute the key.
    """
    file = paths.credentials / SECRET_ACCESS_KEY
    secret = file.read_bytes() if file.is_file() else b""
    return hmac.digest(secret, f"rendezvous/{rendezvous_nonce(identity, paths)}".encode(), "sha256")
