"""`finetune run`, from top to bottom: the job file, the folder of its runs, the lock, and the training or the dry run.
`commands/run_command.py` calls `run_file`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from finetune_cli.bucket.object_store import ObjectStoreReader, access_key_from
from finetune_cli.compare.folders import BucketFolder, LocalFolder, RunFolder
from finetune_cli.jobfiles.plan import read_job
from finetune_cli.localrun.dry_run import show_dry_run
from finetune_cli.localrun.former_settings import check_same_training, former_settings, run_id_of
from finetune_cli.localrun.local_job import LocalJob, LocalPaths, checked_store, local_config, localised, without_files
from finetune_cli.localrun.local_training import STOPPED, LocalTraining
from finetune_cli.localrun.state_folder import STATE, locked, state_folder
from finetune_cli.localrun.trainer_process import GpusHere, check_installed, gpus_here
from finetune_cli.terminal import complain
from finetune_core.api.job import FineTuneJob
from finetune_core.contract import RunConfig
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError
from finetune_core.layout import Location, parse_uri, run_root_of, runs_folder_of

DEFAULT_STORE = Path("finetune-runs")
"""The folder of the runs where the command line names none."""
BUCKET_STORE = "s3"
"""Value of `--store` for the object store of the job."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line says."""

    file: str
    store: str | None = None
    """A folder, BUCKET_STORE, or None for DEFAULT_STORE."""
    paths: LocalPaths = field(default_factory=LocalPaths)
    processes: int | None = None
    device: str | None = None
    """`GPU`, `CPU`, or None for what the job says and this machine has."""
    endpoint: str | None = None
    every: int | None = None
    """Steps between two lines in a pipe."""
    fresh: bool = False
    """Whether to train anew beside the runs that are there."""
    dry_run: bool = False


def run_file(options: RunOptions) -> int:
    """Train the job in the file, or show what would be trained, and return the exit code of the command."""
    check_installed()
    files: dict[str, str] = {}

    def without_local_files(written: dict[str, Any]) -> dict[str, Any]:
        changed, found = without_files(written, Path(options.file).parent if options.file != "-" else Path())
        files.update(found)
        return changed

    document, job = read_job(options.file, without_local_files)
    in_bucket = options.store == BUCKET_STORE
    base = checked_store(DEFAULT_STORE if in_bucket else Path(options.store or DEFAULT_STORE))
    runs = _Runs(job, None if in_bucket else base, options.endpoint)
    if options.fresh and job.spec.storage.run_id is not None:
        raise UserError("--fresh", "must be absent, because the job sets storage.runId: set a new name there")
    run_id = job.spec.storage.run_id or run_id_of(runs.names(needed=options.fresh), fresh=options.fresh)
    resources = resources_here(document["spec"].get("resources", {}), options)
    local = localised(document, replace(options.paths, files=files), resources, run_id)
    folder = runs.folder(local.job)
    former = former_settings(folder) if folder is not None else None
    today = former.template_date if former is not None and former.template_date is not None else _today()
    config = local_config(local.job, store=None if in_bucket else base, endpoint=options.endpoint, today=today)
    if former is not None:
        anew = "set a new storage.runId" if job.spec.storage.run_id is not None else "add --fresh"
        check_same_training(former, config, anew=f"{anew} or give the job another metadata.name to train anew")
    if options.dry_run:
        return _dry_run(local, config, base / STATE / "models")
    metadata = local.job.metadata
    state = state_folder(base, metadata.namespace, metadata.name, run_id)
    with locked(state, f"{metadata.namespace}/{metadata.name}") as lock:
        state.prepare(local.volumes)
        try:
            cache = base / STATE / "models"
            return LocalTraining(local.job, config, state, lock, model_cache=cache, every=options.every).run()
        finally:
            state.clear()


def _dry_run(local: LocalJob, config: RunConfig, model_cache: Path) -> int:
    """Show what would be trained. Nothing is written but temporary files and fetched files of the model."""
    metadata = local.job.metadata
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        state = state_folder(Path(name), metadata.namespace, metadata.name, "dry-run")
        state.prepare(local.volumes)
        file = state.path / "examples.json"
        checked = config
        if config.storage.folder is not None:
            checked = config.model_copy(update={"storage": config.storage.model_copy(update={"folder": name})})
        with locked(state, metadata.name) as lock:
            code = LocalTraining(local.job, checked, state, lock, model_cache=model_cache).dry_run(file)
        if code is not None and code in STOPPED:
            return code
        return show_dry_run(local, config, file, code)


def _today() -> date:
    return datetime.now(UTC).date()


class _Runs:
    """What is in the store already."""

    def __init__(self, job: FineTuneJob, store: Path | None, endpoint: str | None) -> None:
        """``store`` is the folder in place of the object store; None for the object store of ``job``."""
        self._store, self._place = store, parse_uri(runs_folder_of(job))
        keys = access_key_from(os.environ) if store is None else None
        self._reader = ObjectStoreReader(job.spec.storage, keys, endpoint) if keys is not None else None

    def names(self, *, needed: bool) -> list[str]:
        """Return the names of the folders of runs of the job. An object store can be asked only with an access key in
        the environment; without one, raise UserError where the names are ``needed``."""
        if self._store is not None:
            folder = _below(self._store, self._place)
            return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        if self._reader is None:
            if needed:
                raise UserError("environment", f"must have {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY} with --fresh")
            return []
        prefix = self._place.key("")
        found = self._reader.entries(self._place.bucket, f"{prefix}/")
        return sorted({entry.key[len(prefix) + 1 :].partition("/")[0] for entry in found})

    def folder(self, job: FineTuneJob) -> RunFolder | None:
        """Return the folder of all runs of ``job``, None where there is none or where it can't be asked."""
        place = parse_uri(run_root_of(job))
        if self._store is not None:
            folder = _below(self._store, place)
            return LocalFolder(folder) if folder.is_dir() else None
        return BucketFolder(self._reader, place) if self._reader is not None else None


def _below(store: Path, place: Location) -> Path:
    return store / place.bucket / place.prefix


def resources_here(
    resources: Mapping[str, Any], options: RunOptions, gpus: Callable[[], GpusHere] = gpus_here
) -> dict[str, Any]:
    """Return the fields of `resources` that differ on this machine. A job for GPUs takes those that are here, or the
    CPU where there are none. ``gpus`` says what is here, and is only called for a job on GPUs. Raises UserError where
    there are fewer GPUs than processes."""
    on_cpus = resources.get("device") == "CPU"
    wanted = options.processes or resources.get("nodes", 1) * max(1, resources.get("gpusPerNode", 1))
    if options.device == "CPU" or (on_cpus and options.device is None):
        if on_cpus and options.processes is None:
            return {}
        return _on_cpus(options.processes or 1)
    found = gpus()
    if found.count == 0:
        if options.device == "GPU":
            raise UserError("--device", "must be cpu, because torch finds no GPU on this machine")
        complain("finetune: torch finds no GPU on this machine, so the CPU trains")
        return _on_cpus(options.processes or 1)
    if found.count < wanted:
        raise UserError(
            "spec.resources",
            f"needs {wanted} GPUs, and this machine has {found.count}: run again with --processes {found.count}",
        )
    return {"device": "GPU", "nodes": 1, "gpusPerNode": wanted, "gpuProduct": found.product}


def _on_cpus(processes: int) -> dict[str, Any]:
    return {"device": "CPU", "nodes": 1, "gpusPerNode": processes if processes > 1 else 0}
