"""Brings model and data to this machine before any worker starts, and tells early what is missing or misnamed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_core.api.sources import DataSource, HuggingFaceSource, ModelSpec, S3Source, VolumeSource
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.examples import check_columns
from finetune_trainer.errors import OutsideFailure
from finetune_trainer.plan import Inputs
from finetune_trainer.settings import Paths
from finetune_trainer.storage.client import Entry, Store

MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""What transformers reads of a model folder; weights in pickle formats are left where they are."""
PARALLEL_DOWNLOADS = 4


def fetch_inputs(config: RunConfig, paths: Paths, store: Store, folder: Path) -> Inputs:
    """Fetch model and data into ``folder``; raises UserError with the field's path for what is not there."""
    dataset = config.dataset
    train = _data_file(dataset.train, "dataset.train", paths, store, folder / "train")
    validation = test = None
    if dataset.validation is not None:
        validation = _data_file(dataset.validation, "dataset.validation", paths, store, folder / "validation")
    if dataset.test is not None:
        test = _data_file(dataset.test, "dataset.test", paths, store, folder / "test")
    form = dataset.format.prompt_completion
    if form is not None:
        for file, name in ((train, "dataset.train"), (validation, "dataset.validation"), (test, "dataset.test")):
            if file is not None:
                check_columns(file, name, form)
    model = _model_folder(config.model, paths, store, folder / "model")
    return Inputs(model=model, train=train, validation=validation, test=test)


def _volume_path(source: VolumeSource, paths: Paths, name: str) -> Path:
    """Return the path of a volume source; raises UserError where it is not there or leads out of the volume."""
    base = paths.volumes / source.claim_name
    path = base / source.path
    if not path.resolve().is_relative_to(base.resolve()):
        raise UserError(f"{name}.volume.path", "must not lead out of the volume")
    if not path.exists():
        raise UserError(f"{name}.volume.path", f"there is no {source.path!r} in volume {source.claim_name!r}")
    return path


def _data_file(source: DataSource, name: str, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local path of a data file."""
    if source.volume is not None:
        path = _volume_path(source.volume, paths, name)
        if not path.is_file():
            raise UserError(f"{name}.volume.path", "must name a file")
        return path
    if source.s3 is None:
        raise UserError(name, "must be one of s3, volume")
    location = parse_uri(source.s3.uri)
    folder.mkdir()
    path = folder / Path(location.prefix).name
    if store.download(location.bucket, location.prefix, path) is None:
        raise UserError(f"{name}.s3.uri", f"there is no object {source.s3.uri}")
    return path


def _model_folder(source: ModelSpec, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local folder of the base model."""
    if source.volume is not None:
        found = _volume_path(source.volume, paths, "model")
        _require_files([path.name for path in found.iterdir()] if found.is_dir() else [], "model.volume.path")
        return found
    if source.s3 is not None:
        return _model_from_store(source.s3, store, folder)
    if source.hugging_face is not None:
        return _model_from_hub(source.hugging_face, paths, folder)
    raise UserError("model", "must be one of huggingFace, s3, volume")


def _require_files(names: list[str], field: str) -> None:
    """Raise UserError where the names are not those of a model folder."""
    if "config.json" not in names:
        raise UserError(field, "there is no config.json: it must be a folder with a model in transformers' layout")
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(field, "there are no *.safetensors weights; other formats are not read")


def _model_from_store(source: S3Source, store: Store, folder: Path) -> Path:
    location = parse_uri(source.uri)
    start = len(location.prefix) + 1 if location.prefix else 0
    entries = {
        entry.key[start:]: entry
        for entry in store.entries(location.bucket, location.key("") + "/" if location.prefix else "")
        if "/" not in entry.key[start:]
    }
    _require_files(list(entries), "model.s3.uri")
    folder.mkdir()

    def download(item: tuple[str, Entry]) -> None:
        if store.download(location.bucket, item[1].key, folder / item[0]) is None:
            raise UserError("model.s3.uri", f"{item[0]} vanished while it was read")

    wanted = [item for item in entries.items() if item[0].endswith(MODEL_SUFFIXES)]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(download, wanted))
    return folder


def _model_from_hub(source: HuggingFaceSource, paths: Paths, folder: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    token = paths.hub_token_file.read_text().strip() if paths.hub_token_file.is_file() else None
    try:
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=folder,
            token=token,
            allow_patterns=[f"*{suffix}" for suffix in MODEL_SUFFIXES],
        )
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError("model.huggingFace", f"{source.repo} does not exist or the token gives no access") from error
    except (HfHubHTTPError, OSError) as error:
        raise OutsideFailure(f"model.huggingFace: {source.repo} can't be downloaded: {error}") from error
    _require_files([path.name for path in folder.iterdir()], "model.huggingFace.repo")
    return folder
