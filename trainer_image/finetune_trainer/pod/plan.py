"""The worker plan: what the launcher writes to `plan.json` for its worker processes. The plan holds the run file, the
identity of the attempt, and the local paths of model and data.

`read_run_file` reads the run file, which the operator mounts into the pod.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune_core.contract import ContractModel, Identity, RunConfig
from finetune_core.errors import UserError
from finetune_trainer.pod.settings import Paths


class Inputs(ContractModel):
    """Local paths of the base model's folder and of the data files; a data set from the Hugging Face Hub is a folder of
    data files.
    """

    model: Path
    train: Path
    validation: Path | None = None
    test: Path | None = None


class WorkerPlan(ContractModel):
    """Everything that a worker process needs except its ranks, which are in its environment variables."""

    paths: Paths
    identity: Identity
    config: RunConfig
    inputs: Inputs
    folder: Path
    """Scratch folder of this attempt, in which the workers write outcome files, heartbeats and checkpoint snapshots."""


def read_run_file(path: Path) -> RunConfig:
    """Return the parsed run file. Raises UserError that names the invalid field where the file is missing, or was
    written for another version of the trainer.
    """
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"run file {path}", f"can't be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"run file {path}", f"{where}: {first['msg']}") from error
