"""Reads and writes the records in the folder `model-digests/` of a job's runs in the bucket. Each record has the sha256
of a model file, as computed by the pod that first fetched the file for this job. Some sources state no digest of a
file, or only an ETag that may be no digest of the content. With the record, the other pods of the job can then check
the file's copy in the cache on a shared volume (`storage.cache`).

Whoever can write to this folder can also replace the job's checkpoints, so the records are trusted as much as the
checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_core.contract import ContractModel
from finetune_core.contract.contract_model import Count
from finetune_core.contract.same_training import Sha256
from finetune_core.layout import MODEL_DIGESTS
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ObjectDigest

LARGEST_RECORD_BYTES = 1024


class _Record(ContractModel):
    """Content of a record: the size and the sha256 of a model file."""

    version: Annotated[int, Field(ge=1)] = 1
    bytes: Count
    sha256: Sha256


class ModelDigests:
    """The records of one job."""

    def __init__(self, root: RunRoot) -> None:
        """Use the records in ``root``, the folder of the job's runs."""
        self._root = root

    def find(self, tags: Mapping[str, str]) -> dict[str, ObjectDigest]:
        """Return the digests of those files that have a record, by file name. ``tags`` has for each file name the tag
        of the file, a text that differs where the content differs (see `ModelFiles.tag`). Raises OutsideFailure if the
        store can't be reached.

        A record that is malformed counts as absent.
        """
        stored = {entry.key for entry in self._root.list_objects(f"{MODEL_DIGESTS}/")}
        found = {}
        for name, tag in tags.items():
            key = _key(name, tag)
            data = self._root.read_at_most(key, LARGEST_RECORD_BYTES) if key in stored else None
            if data is not None:
                try:
                    record = _Record.model_validate_json(data)
                except ValidationError:
                    continue
                found[name] = ObjectDigest(record.bytes, record.sha256)
        return found

    def note(self, name: str, tag: str, digest: ObjectDigest) -> bool:
        """Record the digest of the file ``name`` with the tag ``tag``. Return whether this digest is now recorded,
        which is False if another pod has recorded another digest before."""
        record = _Record(bytes=digest.bytes, sha256=digest.sha256)
        return self._root.create(_key(name, tag), record.to_json().encode())


def _key(name: str, tag: str) -> str:
    digest = hashlib.sha256(f"{name}\n{tag}".encode(errors="surrogatepass")).hexdigest()
    return f"{MODEL_DIGESTS}/{digest}.json"
