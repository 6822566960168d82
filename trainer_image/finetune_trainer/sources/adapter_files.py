"""Access to the files of the adapter that a job starts from (`model.adapter`): on a volume, in the object store, on the
Hugging Face Hub, or in the artifact of another FineTuneJob.

The launcher fetches the files, `identities.py` makes the adapter's identity from their tags, and the preflight check
looks at them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from finetune_core.api.sources import S3Source
from finetune_core.contract import AdapterArtifact, RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import MANIFEST, Manifest, ManifestFile, digest
from finetune_trainer.pod.errors import one_line
from finetune_trainer.pod.model_file_names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    PICKLED_ADAPTER_FILE,
)
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.content_digest import ContentDigest, own_digest
from finetune_trainer.sources.model_files import ModelFiles, StoreFiles, files_of
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.run_store import digest_of_file

SECTION = "model.adapter"
"""Path of the adapter in the spec."""
LARGEST_CONFIG_BYTES = 1 << 20
"""Largest size in bytes of an `adapter_config.json` that is read."""
LARGEST_MANIFEST_BYTES = 16 << 20
"""Largest size in bytes of an artifact's manifest that is read."""


def adapter_files(config: RunConfig, paths: Paths, store: Store) -> ModelFiles | None:
    """Return access to the files of the folder that `model.adapter` names; None without that field.

    Raises UserError if a folder on a volume or a revision on the Hugging Face Hub does not exist, or if the artifact of
    another job is gone or is not the one that the operator recorded. Raises OutsideFailure if the folder can't be read.
    A folder of the object store that does not exist counts as an empty folder.
    """
    source = config.model.adapter
    if source is None:
        return None
    if source.job is None:
        return files_of(source, SECTION, paths.hub_data_tokens / SECTION, paths, store)
    if config.adapter_artifact is None:
        raise UserError(f"{SECTION}.job", f"the run file does not say where the artifact of {source.job.name} lies")
    return JobFiles(config.adapter_artifact, source.job.name, store)


def select_adapter_files(files: ModelFiles) -> list[str]:
    """Return the names of the two files of an adapter: its configuration and its weights. Raises UserError if one of
    them is missing, or if the configuration has more than LARGEST_CONFIG_BYTES bytes."""
    if ADAPTER_CONFIG_FILE not in files.sizes:
        what = "a whole model" if CONFIG_FILE in files.sizes else "no adapter"
        hint = "; name it as the base model, in `model`" if CONFIG_FILE in files.sizes else ""
        raise UserError(files.field, f"there is no {ADAPTER_CONFIG_FILE}: the folder holds {what}{hint}")
    if files.sizes[ADAPTER_CONFIG_FILE] > LARGEST_CONFIG_BYTES:
        raise UserError(
            files.field, f"{ADAPTER_CONFIG_FILE} has more than the {LARGEST_CONFIG_BYTES} bytes that are read"
        )
    if ADAPTER_FILE not in files.sizes:
        if PICKLED_ADAPTER_FILE in files.sizes:
            raise UserError(
                files.field,
                f"{PICKLED_ADAPTER_FILE} is a pickle, which can run any code and is never read: save the adapter as"
                f" {ADAPTER_FILE}",
            )
        raise UserError(files.field, f"there is no {ADAPTER_FILE}")
    return [ADAPTER_CONFIG_FILE, ADAPTER_FILE]


class JobFiles(StoreFiles):
    """Access to the artifact of another job in the object store. Its manifest must be the one that the status of that
    job recorded, and states the sha256 of every file."""

    def __init__(self, artifact: AdapterArtifact, name: str, store: Store) -> None:
        """List the folder, and read and verify its manifest. ``name`` is the name of the other job. Raises UserError
        where the artifact is gone or has changed, and OutsideFailure where the store can't be reached."""
        self._where = f"the artifact of job {name} ({one_line(artifact.uri)})"
        try:
            source = S3Source(uri=artifact.uri)
        except ValidationError as error:
            raise UserError(f"{SECTION}.job", f"{self._where} has no address of an object store") from error
        super().__init__(source, store, SECTION)
        self.field = f"{SECTION}.job"
        data = super().read(MANIFEST, 0, LARGEST_MANIFEST_BYTES) if MANIFEST in self.sizes else None
        if data is None:
            raise UserError(self.field, f"{self._where} is gone")
        if digest(data) != artifact.manifest_sha256:
            raise UserError(
                self.field,
                f"{self._where} is not what that job committed: the sha256 of its {MANIFEST} is"
                f" {digest(data)[:12]}…, not {artifact.manifest_sha256[:12]}…",
            )
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise UserError(self.field, f"{self._where} has a {MANIFEST} of another version") from error
        self._stated: dict[str, ManifestFile] = {file.name: file for file in manifest.files if "/" not in file.name}
        for file in self._stated.values():
            if self.sizes.get(file.name) != file.bytes:
                raise UserError(
                    self.field,
                    f"{self._where} is not what that job committed: {file.name} is missing or has another size",
                )
        self.sizes = {name: file.bytes for name, file in self._stated.items()}

    def tag(self, name: str) -> str:
        """Return size and sha256 of a file, so that the same content in another folder has the same tag."""
        return f"{self._stated[name].bytes} {self._stated[name].sha256}"

    def digest(self, name: str) -> ContentDigest | None:
        """Return the sha256 that the manifest states."""
        return own_digest(self._stated[name].bytes, self._stated[name].sha256)

    def check_content(self, names: Collection[str], folder: Path) -> None:
        """Raise UserError if the sha256 of a file of ``names`` in the local ``folder`` is not the one that the manifest
        states for this file."""
        for name in names:
            if digest_of_file(folder / name).sha256 != self._stated[name].sha256:
                raise UserError(
                    self.field, f"{self._where} is not what that job committed: the sha256 of {name} differs"
                )
