"""Fetches the base model, an adapter and the data files before any worker starts, so that missing files and misspelled
columns are reported early. Files on a volume are used where they are.

The launcher calls `fetch_inputs` and `job_size`. Other modules call `source_name`, `adapter_name` and `model_revision`
to name a source in messages and records.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable
from pathlib import Path

from finetune_core.api.method import DEFAULT_RANK
from finetune_core.api.sources import DataSource, InitialAdapterSpec, ModelSpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError, valid_text
from finetune_core.planning.scratch import FULL_STATE, state_share
from finetune_trainer.data.dataset import check_columns, check_tools_of_mix
from finetune_trainer.data.files.index import INDEX_FILE, read_index, write_index
from finetune_trainer.data.prompts import base_prompt_columns
from finetune_trainer.pod.model_file_names import CONFIG_FILE
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.pod.settings import Paths
from finetune_trainer.pod.time_limits import JobSize
from finetune_trainer.sources.adapter_files import JobFiles, adapter_files, select_adapter_files
from finetune_trainer.sources.cache.cached_fetch import fetch_model_files
from finetune_trainer.sources.data_files import find_data_files
from finetune_trainer.sources.model_files import LocalFiles, model_files
from finetune_trainer.sources.model_selection import select_model_files
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.model_digests import ModelDigests
from finetune_trainer.storage.root import RunRoot, source_store
from finetune_trainer.storage.store_errors import writing


def fetch_inputs(config: RunConfig, paths: Paths, root: RunRoot, folder: Path) -> Inputs:
    """Fetch model, adapter and data, and check the columns of the data files. Whatever is not on a volume is downloaded
    into ``folder``. Only the model is downloaded into the volume of `storage.cache.ephemeral` instead, if the job has
    this volume. Return the local paths. ``root`` is the folder of the job's runs.

    Raises UserError with the field of the spec if a file or column does not exist.
    """
    found: dict[str, Path] = {}
    store = source_store(root, config, paths)
    for number, (field, source) in enumerate(config.dataset.sources.items()):
        found[field] = data_file(source, field, paths, store, folder / f"data-{number}")
        asked = base_prompt_columns(config.dataset, field, config.evaluation.base_prompt)
        check_columns(found[field], field, config.dataset.format, asked)
    check_tools_of_mix(found, config.dataset.format)
    mix = [path for field, path in found.items() if field.startswith("dataset.train.mix[")]
    own = ModelDigests(root)
    model = _model_folder(config.model, paths, store, folder / "model", own)
    return Inputs(
        model=model,
        adapter=_adapter_folder(config, paths, store, folder / "adapter", own),
        train=found.get("dataset.train", folder),
        mix=mix,
        validation=found.get("dataset.validation"),
        test=found.get("dataset.test"),
    )


def source_name(source: ModelSpec | InitialAdapterSpec | DataSource) -> str:
    """Return the name of a source in messages: the `s3://` address, the repository on the hub with the path in it,
    `<claim>/<path>`, or how many sources a mix has."""
    hub = source.hugging_face
    if hub is not None:
        path = getattr(hub, "path", None)
        return f"{hub.repo}/{path}" if path else hub.repo
    if source.s3 is not None:
        return source.s3.uri
    if source.volume is not None:
        return f"{source.volume.claim_name}/{source.volume.path}"
    mix = getattr(source, "mix", None)
    if mix:
        return f"the mix of {len(mix)} sources"
    raise UserError("model", "must name a source")


def job_size(config: RunConfig, inputs: Inputs) -> JobSize:
    """Return the sizes on which the time limits of the job depend. Model and data are measured. The sizes of checkpoint
    and artifact follow from the size of the model, as in the request for scratch space (`planning/scratch.py`)."""
    lora = config.lora
    model, adapter = _size(inputs.model), _size(inputs.adapter) if inputs.adapter is not None else 0
    sources = [*(inputs.mix or [inputs.train]), inputs.validation, inputs.test]
    # Where the job continues an adapter, the files of the adapter say how large its state is.
    share = state_share(None if lora is None else lora.rank or DEFAULT_RANK)
    state = max(int(share * model), FULL_STATE * adapter)
    # Added tokens and a merged adapter make a copy of the base model, which is published beside an adapter.
    is_extended = bool(config.model.added_tokens) or config.model.adapter is not None
    exports_model = lora is None or config.storage.artifact != "Adapter"
    return JobSize(
        model_bytes=model + adapter,
        artifact_bytes=(exports_model + is_extended) * model + (state if lora is not None else 0),
        checkpoint_bytes=state,
        data_bytes=sum(_size(source) for source in sources if source is not None),
        nodes=config.world.nodes,
    )


def _size(path: Path) -> int:
    """Return the size in bytes of the files in the folder ``path``, of the files that its index names, or of the file
    ``path``. A file that is gone counts as empty, because the code that reads the file says so better."""
    if path.is_file():
        files: Iterable[Path] = [path]
    elif (path / INDEX_FILE).is_file():
        files = (file.path for file in read_index(path))
    else:
        files = path.rglob("*")
    size = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def model_revision(source: ModelSpec | InitialAdapterSpec, folder: Path, config_file: str = CONFIG_FILE) -> str | None:
    """Return the commit at which the model or adapter in ``folder`` was downloaded from the Hugging Face Hub. If the
    commit is not known, return the revision that the job names. Return None if ``source`` is not on the hub.
    ``config_file`` is a file in ``folder`` for which the hub's client may have noted the commit."""
    if source.hugging_face is None:
        return None
    from huggingface_hub._local_folder import read_download_metadata

    metadata = read_download_metadata(folder, config_file)
    return metadata.commit_hash if metadata is not None else source.hugging_face.revision


def adapter_name(config: RunConfig) -> str:
    """Return the name of the adapter's source in messages and records. The job must have an adapter."""
    source = config.model.adapter
    assert source is not None
    if source.job is None:
        return source_name(source)
    return config.adapter_artifact.uri if config.adapter_artifact is not None else f"job {source.job.name}"


def data_file(source: DataSource, field: str, paths: Paths, store: Store, folder: Path) -> Path:
    """Create ``folder`` with an index of the source's data files, and return ``folder``, which `read_rows` reads. Files
    in the object store or on the Hugging Face Hub are downloaded into ``folder`` first.

    ``field`` is the path of the source in the spec, for example `dataset.train`. Raises UserError if the source has no
    data file.
    """
    folder.mkdir()
    found = find_data_files(source, field, paths, store, folder)
    for notice in found.notices:
        print(valid_text(notice), flush=True)
    write_index(folder, found.fetch(found.files, folder))
    return folder


def _model_folder(source: ModelSpec, paths: Paths, store: Store, folder: Path, own: ModelDigests) -> Path:
    """Fetch the files of the base model, without other files that lie beside the model, and return their local folder.
    Files on a volume stay there, and ``folder`` has links to them. Other files are downloaded into ``folder``, or into
    the volume of `storage.cache.ephemeral`. ``own`` holds the digests of model files that pods of this job have
    computed."""
    files = model_files(source, paths, store)
    selection = select_model_files(files)
    for notice in selection.notices:
        print(valid_text(notice), flush=True)
    if isinstance(files, LocalFiles):
        folder.mkdir()
        files.fetch(selection.names, folder)
        return folder
    if paths.model_volume.is_dir():
        folder = paths.model_volume / "model"
    with writing(folder):
        folder.mkdir()
    fetch_model_files(files, selection.names, folder, paths.model_cache, own)
    return folder


def _adapter_folder(config: RunConfig, paths: Paths, store: Store, folder: Path, own: ModelDigests) -> Path | None:
    """Fetch the two files of the adapter that the job starts from, and return their local folder; None without an
    adapter."""
    files = adapter_files(config, paths, store)
    if files is None:
        return None
    names = select_adapter_files(files)
    folder.mkdir()
    if isinstance(files, LocalFiles):
        files.fetch(names, folder)
        return folder
    fetch_model_files(files, names, folder, paths.model_cache, own)
    if isinstance(files, JobFiles):
        files.check_content(names, folder)
    return folder
