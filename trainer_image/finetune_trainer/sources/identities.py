"""Identities of the base model, of the adapter that a job starts from, and of the data, by which two runs are compared:
the identities are equal if both runs read the same files. Of large files on a volume only parts are compared (see
`file_tags.py`).

The launcher of rank 0 determines the identities when an attempt starts, and the run record in the bucket keeps them.
The preflight check of a job whose status is lost determines the identities again, and compares them with those in the
run records. The object store and the Hugging Face Hub give a tag of each file's content (ETag, blob id). So none of
their files are downloaded, except the data cards on the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from finetune_core.contract import RunConfig
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.adapter_files import adapter_files, select_adapter_files
from finetune_trainer.sources.data_files import find_data_files
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.sources.model_selection import select_model_files
from finetune_trainer.storage.client import Store


def input_identities(config: RunConfig, paths: Paths, store: Store, folder: Path) -> dict[str, str]:
    """Return the identity of the base model (`model`), of an adapter (`model.adapter`) and of each data set (such as
    `dataset.train`), as sha256 by its path in the spec. ``folder`` is a local folder for small files of the Hugging
    Face Hub.

    Raises UserError if a source does not exist, and OutsideFailure if it can't be read.
    """
    tags: dict[str, dict[str, str]] = {}
    for number, (field, source) in enumerate(config.dataset.sources.items()):
        files = find_data_files(source, field, paths, store, folder / f"data-{number}")
        part, _, of_mix = field.partition(".mix")
        # The sources of a mix make up one identity.
        tags.setdefault(part, {}).update({f"{of_mix}{file.path}": files.tag(file) for file in files.files})
    found = {part: _digest(of_part) for part, of_part in tags.items()}
    model = model_files(config.model, paths, store)
    found["model"] = _digest({name: model.tag(name) for name in select_model_files(model).names})
    adapter = adapter_files(config, paths, store)
    if adapter is not None:
        found["model.adapter"] = _digest({name: adapter.tag(name) for name in select_adapter_files(adapter)})
    return found


def _digest(tags: Mapping[str, str]) -> str:
    text = "".join(f"{name}\n{tags[name]}\n" for name in sorted(tags))
    # A file name on a volume may hold bytes that are no UTF-8, and a file name on the hub half of a surrogate pair.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
