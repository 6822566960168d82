"""The worker plan: what the launcher writes to `plan.json` for its worker processes. It holds the content of the run
file, the identity of the attempt, and the local paths of model and data.

`read_run_file` reads the run file, which the operator mounts into the pod.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune_core.contract import ContractModel, Identity, RunConfig
from finetune_core.contract.training import TrainingRecord
from finetune_core.errors import UserError
from finetune_trainer.pod.settings import Paths


class Inputs(ContractModel):
    """Local paths of the base model's folder and of the data files. For a data set of the Hugging Face Hub the path is
    a folder with data files."""

    model: Path
    train: Path
    validation: Path | None = None
    test: Path | None = None
    training: TrainingRecord | None = None
    """What the attempt trains, for the run record. None on all nodes but that of rank 0."""


class WorkerPlan(ContractModel):
    """Everything that a worker process needs to know, except its rank and the number of ranks. These two are in
    environment variables."""

    paths: Paths
    identity: Identity
    config: RunConfig
    inputs: Inputs
    folder: Path
    """Temporary folder of the attempt, in which the workers write outcome files, heartbeats and snapshots of
    checkpoints."""


def read_run_file(path: Path) -> RunConfig:
    """Return the content of the run file. Raises UserError if the file can't be read, or if a field is invalid because
    the file was written for another version of the trainer."""
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"run file {path}", f"can't be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"run file {path}", f"{where}: {first['msg']}") from error
