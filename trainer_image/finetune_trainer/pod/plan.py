"""What the launcher hands to its workers: where the inputs lie on this machine, beside run file and identity."""

from __future__ import annotations

from pathlib import Path

from finetune_core.contract import ContractModel, Identity, RunConfig
from finetune_core.layout import parse_uri
from finetune_trainer.pod.settings import Paths
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.root import RunRoot


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


def open_root(config: RunConfig, paths: Paths) -> RunRoot:
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
