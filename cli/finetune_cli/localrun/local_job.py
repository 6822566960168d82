"""What of a job is different on this machine: where model and rows lie, how many processes train, on which device, and
the folder of the runs. The functions are pure, except that paths are looked at.

`run_job.py` calls `localised` with the document of the job file, and `local_config` with the job.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from finetune_core.api.job import FineTuneJob
from finetune_core.contract import RunConfig, WorldConfig
from finetune_core.contract.run_file import FOLDER_PATTERN
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from finetune_core.validation.problems import LOCAL_FILE
from finetune_core.validation.validate_job import validate_job

UID = "local"
"""uid of a job that no API server has stored."""
LONGEST_FOLDER = 255
"""Largest number of characters of the path of a store, as in the run file."""
_GLOB = re.compile(r"[*?\[]")
_SOURCES = {
    "--model": ("model",),
    "--train": ("dataset", "train"),
    "--validation": ("dataset", "validation"),
    "--test": ("dataset", "test"),
}
"""The options that name a local path, and the section of the spec that the path replaces."""


@dataclass(frozen=True, slots=True)
class LocalPaths:
    """The paths of this machine on the command line."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """By option, such as `--train`: a path that takes the place of a source of the job."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The same for paths that the job file itself names in the field LOCAL_FILE. An option wins."""
    volumes: Mapping[str, Path] = field(default_factory=dict)
    """By name of a claim: the folder that takes the place of the volume."""


@dataclass(frozen=True, slots=True)
class LocalJob:
    """A job for this machine."""

    document: dict[str, Any]
    """The document of the job file, with the local sources."""
    job: FineTuneJob
    volumes: Mapping[str, Path]
    """By name of a claim: the folder that takes the place of the volume."""


def localised(document: Mapping[str, Any], paths: LocalPaths, resources: Mapping[str, Any], run_id: str) -> LocalJob:
    """Return the job of ``document`` with the sources that ``paths`` names, and with the fields of ``resources`` in
    place of its own. ``run_id`` names the folder of the runs, where the job does not.

    Raises UserError that names the option or the field: for a path where nothing is, for a volume that is no folder
    here, and for a job that can't be run so.
    """
    changed = copy.deepcopy(dict(document))
    spec: dict[str, Any] = changed["spec"]
    volumes = {name: _folder(f"--volume {name}", folder) for name, folder in paths.volumes.items()}
    for option, sections_of_source in _SOURCES.items():
        *sections, last = sections_of_source
        if option in paths.sources:
            named, text = option, paths.sources[option]
        elif option in paths.files:
            named, text = ".".join(("spec", *sections_of_source, LOCAL_FILE)), paths.files[option]
        else:
            continue
        target = spec
        for section in sections:
            target = target[section]
        claim = f"local-{last}"
        folder, path = _split(named, text, is_model=option == "--model")
        volumes[claim] = folder
        kept = {name: value for name, value in target.get(last, {}).items() if name in ("adapter", "addedTokens")}
        target[last] = {**kept, "volume": {"claimName": claim, "path": path}}
    if "--model" in (*paths.sources, *paths.files):
        spec["storage"].pop("cache", None)
    spec["storage"].setdefault("runId", run_id)
    if resources:
        spec["resources"] = {**spec.get("resources", {}), **resources}
    changed["metadata"] = {**changed["metadata"], "uid": UID}
    problems = validate_job(changed).problems
    if problems:
        raise UserError(".".join(map(str, problems[0].path)), problems[0].message)
    job = FineTuneJob.model_validate(changed)
    for where, claim in claims_of(job):
        if claim not in volumes:
            raise UserError(where, f"must be a folder of this machine here: run again with --volume {claim}=FOLDER")
    adapter = job.spec.model.adapter
    if adapter is not None and adapter.job is not None:
        raise UserError(
            "spec.model.adapter.job",
            "names a job of a cluster: fetch its adapter with `finetune download`, and name it with"
            " model.adapter.volume and --volume NAME=FOLDER",
        )
    return LocalJob(changed, job, volumes)


def without_files(document: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return ``document``, a job as it is written, with a volume in place of each source that the field LOCAL_FILE
    names, so that the rest can be checked as for a cluster, and the paths by option. A relative path begins in
    ``folder``, that of the job file. What is no text is left for the check to refuse."""
    changed, files = copy.deepcopy(dict(document)), {}
    for option, sections in _SOURCES.items():
        source: Any = changed.get("spec")
        for section in sections:
            source = source.get(section) if isinstance(source, dict) else None
        if not isinstance(source, dict) or "volume" in source:
            continue
        if isinstance(source.get(LOCAL_FILE), str) and source[LOCAL_FILE]:
            files[option] = str(folder / Path(source.pop(LOCAL_FILE)).expanduser())
            source["volume"] = {"claimName": f"local-{sections[-1]}", "path": "file"}
    return changed, files


def claims_of(job: FineTuneJob) -> Sequence[tuple[str, str]]:
    """Return, for each source of ``job`` that is a volume, the path of the field and the name of the claim."""
    spec = job.spec
    found = [("spec.model", spec.model.volume)]
    if spec.model.adapter is not None:
        found.append(("spec.model.adapter", spec.model.adapter.volume))
    found += [(f"spec.{name}", source.volume) for name, source in spec.dataset.sources.items()]
    return [(f"{where}.volume.claimName", volume.claim_name) for where, volume in found if volume is not None]


def _split(option: str, text: str, *, is_model: bool) -> tuple[Path, str]:
    """Return the folder that stands for a volume, and the path below it, of the path ``text`` of this machine. In a
    path of data files, `*`, `?` and `[` begin a glob."""
    path = Path(text).expanduser().absolute()
    parts = path.parts
    first = next((number for number, part in enumerate(parts) if _GLOB.search(part)), None)
    if first is not None and not is_model and not path.exists():
        return _folder(option, Path(*parts[:first])), "/".join(parts[first:])
    if not path.exists():
        raise UserError(option, f"must name {'a folder' if is_model else 'a file or a folder'}, and {text} is none")
    if is_model and not path.is_dir():
        raise UserError(option, f"must name the folder of a model, and {text} is a file")
    path = path.resolve()
    return path.parent, path.name


def _folder(option: str, folder: Path) -> Path:
    found = folder.expanduser().absolute()
    if not found.is_dir():
        raise UserError(option, f"must name a folder, and {folder} is none")
    return found


def local_config(job: FineTuneJob, *, store: Path | None, endpoint: str | None, today: date) -> RunConfig:
    """Return the run file of ``job`` for this machine: that of the operator, with all processes in one node.

    ``store`` is the folder in place of the object store, None for the object store of the job. ``endpoint`` replaces
    the address of the object store. ``today`` is the date that chat templates get.
    """
    config = resolve(job, report=None, today=today)
    world = config.world
    storage: dict[str, Any] = {"credentials": "Identity", "folder": str(store) if store is not None else None}
    if endpoint is not None:
        storage["endpoint"] = endpoint.rstrip("/")
    changes = {
        "world": WorldConfig(
            nodes=1,
            processes_per_node=world.size,
            device=world.device,
            gpu_product=world.gpu_product,
            memory_bytes=None,
            shared_memory_bytes=world.shared_memory_bytes,
        ),
        "storage": config.storage.model_copy(update=storage),
    }
    return config.model_copy(update=changes)


def checked_store(folder: Path) -> Path:
    """Return the absolute path of ``folder``, in which the runs lie. Raises UserError where the trainer could not name
    the path."""
    path = folder.expanduser().absolute()
    if len(str(path)) > LONGEST_FOLDER or re.fullmatch(FOLDER_PATTERN, str(path)) is None:
        raise UserError(
            "--store", f"must be a folder whose path has at most {LONGEST_FOLDER} characters and no control characters"
        )
    if path.exists() and not path.is_dir():
        raise UserError("--store", f"must name a folder, and {folder} is a file")
    return path


def cpus_asked(job: FineTuneJob) -> int | None:
    """Return how many CPUs all pods of a job on CPUs ask for together, in thousandths. None where the job does not say
    it, or trains on GPUs.

    The number of threads of a process follows from it, as in a pod, and the results of CPU computations depend on the
    number of threads.
    """
    resources = job.spec.resources
    if resources.device != "CPU" or resources.cpu is None:
        return None
    text = str(resources.cpu)
    each = float(text.removesuffix("m")) if text.endswith("m") else 1000 * float(text)
    return round(each * resources.nodes)
