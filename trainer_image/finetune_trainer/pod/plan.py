"""What the launcher hands to its workers: where the inputs lie on this machine, beside run file and identity."""

from __future__ import annotations

from pathlib import Path

from finetune_core.contract import ContractModel, Identity, RunConfig
from finetune_trainer.pod.settings import Paths


class Inputs(ContractModel):
    """Local copies of model and data."""

    model: Path
    train: Path
    validation: Path | None = None
    test: Path | None = None


class WorkerPlan(ContractModel):
    """Everything that a worker process needs; its ranks come from the environment."""

    paths: Paths
    identity: Identity
    config: RunConfig
    inputs: Inputs
    folder: Path
    """Where the workers of this attempt write: outcomes, snapshots."""
