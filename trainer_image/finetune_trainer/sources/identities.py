"""Identities of the base model, of the adapter that a job starts from, and of the data, by which two runs are compared:
the identities are equal if both runs read the same files. Of large files on a volume only parts are compared (see
`file_tags.py`).

The launcher of rank 0 determines the identities when an attempt starts, and the run record in the bucket keeps them. If
a former job of the same namespace and name trained with the same settings, the preflight check determines the
identities again, and compares them with those in the run records of the former job. The object store and the Hugging
Face Hub state a tag of each file's content (ETag, blob id). So only small files are downloaded from them: the data
cards of data sets on the hub, the index of the model's weight files, and, if the adapter comes from the artifact of
another job, the manifest of this artifact.
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
        # All sources of a mix together have one identity.
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
    # A file name on a volume may hold bytes that are no UTF-8. A file name on the hub may hold half of a surrogate
    # pair.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
