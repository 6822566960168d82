"""Brings model and data to this machine before any worker starts, and tells early what is missing or misnamed."""

from __future__ import annotations

from pathlib import Path

from finetune_core.api.sources import DataSource, HuggingFaceDataSource, ModelSpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.dataset import check_columns
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.hub_data import fetch_split
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, LocalFiles, model_files, volume_path
from finetune_trainer.storage.client import Store


def fetch_inputs(config: RunConfig, paths: Paths, store: Store, folder: Path) -> Inputs:
    """Fetch model and data into ``folder``; raises UserError with the field's path for what is not there."""
    dataset = config.dataset
    train = data_file(dataset.train, "dataset.train", paths, store, folder / "train")
    validation = test = None
    if dataset.validation is not None:
        validation = data_file(dataset.validation, "dataset.validation", paths, store, folder / "validation")
    if dataset.test is not None:
        test = data_file(dataset.test, "dataset.test", paths, store, folder / "test")
    for file, name in ((train, "dataset.train"), (validation, "dataset.validation"), (test, "dataset.test")):
        if file is not None:
            check_columns(file, name, dataset.format)
    model = _model_folder(config.model, paths, store, folder / "model")
    return Inputs(model=model, train=train, validation=validation, test=test)


def source_name(source: ModelSpec | DataSource) -> str:
    """Return how a person names a source: its address, repository or claim."""
    hub = getattr(source, "hugging_face", None)
    if hub is not None:
        return str(hub.repo)
    if source.s3 is not None:
        return source.s3.uri
    if source.volume is not None:
        return f"{source.volume.claim_name}/{source.volume.path}"
    raise UserError("model", "must name a source")


def data_file(source: DataSource, name: str, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local path of a data file; raises UserError where it is not there."""
    if source.volume is not None:
        path = volume_path(source.volume, paths, name)
        if not path.is_file():
            raise UserError(f"{name}.volume.path", "must name a file")
        return path
    if source.hugging_face is not None:
        return fetch_split(source.hugging_face, name, data_token(source.hugging_face, name, paths), folder)
    if source.s3 is None:
        raise UserError(name, "must be one of huggingFace, s3, volume")
    location = parse_uri(source.s3.uri)
    folder.mkdir()
    path = folder / Path(location.prefix).name
    if store.download(location.bucket, location.prefix, path) is None:
        raise UserError(f"{name}.s3.uri", f"there is no object {source.s3.uri}")
    return path


def data_token(source: HuggingFaceDataSource, name: str, paths: Paths) -> str | None:
    """Return the token for a data set; None where the job names none."""
    return (paths.hub_data_tokens / name).read_text().strip() if source.token_secret_ref is not None else None


def _model_folder(source: ModelSpec, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local folder of the base model: a volume's as it is, of anything else what transformers reads."""
    files = model_files(source, paths, store)
    if isinstance(files, LocalFiles):
        return files.folder
    folder.mkdir()
    files.fetch([name for name in files.sizes if name.endswith(MODEL_SUFFIXES)], folder)
    return folder
