"""Identities of the base model and of the data: texts that differ where the files differ. Two runs with equal
identities read the same content. Of large files on a volume only parts are compared.

The launcher of rank 0 determines the identities when an attempt starts, and the run record in the bucket keeps them.
The preflight check of a job whose status is lost determines the identities again, and compares them with those in the
run records. The object store and the Hugging Face Hub give a tag of each file's content (ETag, blob id), so of their
files only the data cards on the hub are downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from finetune_core.api.sources import DataSource
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.file_tags import file_tag
from finetune_trainer.sources.hub_datasets import split_tags
from finetune_trainer.sources.inputs import data_file, data_token
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, model_files
from finetune_trainer.storage.client import Store


def input_identities(config: RunConfig, paths: Paths, store: Store, folder: Path) -> dict[str, str]:
    """Return the identity of the base model and of each data source, as sha256 by the path in the spec, such as
    `dataset.train`. ``folder`` is a local folder for small files of the Hugging Face Hub.

    Raises UserError if a source does not exist, and OutsideFailure if it can't be read.
    """
    found, dataset = {}, config.dataset
    for part, source in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test)):
        if source is not None:
            field = f"dataset.{part}"
            found[field] = _digest(_data_tags(source, field, paths, store, folder / part))
    files = model_files(config.model, paths, store)
    found["model"] = _digest({name: files.tag(name) for name in files.sizes if name.endswith(MODEL_SUFFIXES)})
    return found


def _data_tags(source: DataSource, field: str, paths: Paths, store: Store, folder: Path) -> Mapping[str, str]:
    """Return a tag of the content of each file of a data source, by the file's name."""
    if source.hugging_face is not None:
        return split_tags(source.hugging_face, field, data_token(source.hugging_face, field, paths), folder)
    if source.s3 is not None:
        location = parse_uri(source.s3.uri)
        entry = store.stat(location.bucket, location.prefix)
        if entry is None:
            raise UserError(f"{field}.s3.uri", f"there is no object {source.s3.uri}")
        return {location.prefix: entry.tag}
    return {"": file_tag(data_file(source, field, paths, store, folder))}


def _digest(tags: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}\n{tags[name]}\n" for name in sorted(tags)).encode()).hexdigest()
