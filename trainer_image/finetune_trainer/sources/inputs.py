"""Fetches the base model and the data files to local paths before any worker starts, so that missing files and
misspelled columns are reported early.

The launcher calls `fetch_inputs`. The preflight checks call the functions that fetch or name a single source.
"""

from __future__ import annotations

from pathlib import Path

from finetune_core.api.sources import DataSource, HuggingFaceDataSource, ModelSpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.dataset import check_columns
from finetune_trainer.data.prompts import base_prompt_columns
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.hub_datasets import fetch_split
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, LocalFiles, model_files, volume_path
from finetune_trainer.storage.client import Store


def fetch_inputs(config: RunConfig, paths: Paths, store: Store, folder: Path) -> Inputs:
    """Fetch model and data, and check the columns of the data files. Whatever is not on a volume is downloaded into
    ``folder``.

    Raises UserError with the field of the spec if a file or column does not exist.
    """
    dataset = config.dataset
    train = data_file(dataset.train, "dataset.train", paths, store, folder / "train")
    validation = test = None
    if dataset.validation is not None:
        validation = data_file(dataset.validation, "dataset.validation", paths, store, folder / "validation")
    if dataset.test is not None:
        test = data_file(dataset.test, "dataset.test", paths, store, folder / "test")
    for file, field in ((train, "dataset.train"), (validation, "dataset.validation"), (test, "dataset.test")):
        if file is not None:
            asked = base_prompt_columns(dataset, field, config.evaluation.base_prompt)
            check_columns(file, field, dataset.format, asked)
    model = _model_folder(config.model, paths, store, folder / "model")
    return Inputs(model=model, train=train, validation=validation, test=test)


def source_name(source: ModelSpec | DataSource) -> str:
    """Return the name of a source in messages: the `s3://` address, the repository on the hub, or `<claim>/<path>`."""
    hub = getattr(source, "hugging_face", None)
    if hub is not None:
        return str(hub.repo)
    if source.s3 is not None:
        return source.s3.uri
    if source.volume is not None:
        return f"{source.volume.claim_name}/{source.volume.path}"
    raise UserError("model", "must name a source")


def data_file(source: DataSource, field: str, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local path of a data file, or of a folder with the data files of a split. Files in the object store or
    on the Hugging Face Hub are downloaded into ``folder`` first.

    ``field`` is the path of the source in the spec: `dataset.train`. Raises UserError if there is no such file.
    """
    if source.volume is not None:
        path = volume_path(source.volume, paths, field)
        if not path.is_file():
            raise UserError(f"{field}.volume.path", "must name a file")
        return path
    if source.hugging_face is not None:
        return fetch_split(source.hugging_face, field, data_token(source.hugging_face, field, paths), folder)
    if source.s3 is None:
        raise UserError(field, "must be one of huggingFace, s3, volume")
    location = parse_uri(source.s3.uri)
    folder.mkdir()
    path = folder / Path(location.prefix).name
    if store.download(location.bucket, location.prefix, path) is None:
        raise UserError(f"{field}.s3.uri", f"there is no object {source.s3.uri}")
    return path


def data_token(source: HuggingFaceDataSource, field: str, paths: Paths) -> str | None:
    """Return the token for reading a data set on the Hugging Face Hub, or None if the spec names no Secret. ``field``
    is, for example, `dataset.train`, and the file with the token has the same name."""
    return (paths.hub_data_tokens / field).read_text().strip() if source.token_secret_ref is not None else None


def _model_folder(source: ModelSpec, paths: Paths, store: Store, folder: Path) -> Path:
    """Return the local folder of the base model. A model on a volume is used where it lies. Otherwise the files that
    transformers reads are downloaded into ``folder``."""
    files = model_files(source, paths, store)
    if isinstance(files, LocalFiles):
        return files.folder
    folder.mkdir()
    files.fetch([name for name in files.sizes if name.endswith(MODEL_SUFFIXES)], folder)
    return folder
