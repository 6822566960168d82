"""Writes and reads folders in the bucket in such a way that an unfinished upload never counts. The files of a folder
are uploaded first. Then comes a manifest with their sizes and sha256, and last the object COMMIT with the sha256 of the
manifest.

A folder without COMMIT does not count. Checkpoints and artifacts are written with `upload_files` and `commit_folder`,
and read with `read_manifest`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from finetune_core.layout import COMMIT, MANIFEST, Manifest, ManifestFile, digest
from finetune_trainer.pod.errors import Damaged, NewerRun
from finetune_trainer.storage.lineage import check_fence
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ListedObject

PARALLEL_TRANSFERS = 4


def upload_files(root: RunRoot, folder: str, files: Sequence[Path], *, below: Path | None = None) -> list[ManifestFile]:
    """Upload ``files`` into ``folder`` of the bucket, and return an entry for the manifest for each file. Objects are
    named after the files. With ``below``, a local folder, the objects are named by the paths of the files relative to
    ``below``."""

    def upload(path: Path) -> ManifestFile:
        name = path.relative_to(below).as_posix() if below is not None else path.name
        stored = root.upload(f"{folder}/{name}", path)
        return ManifestFile(name=name, bytes=stored.bytes, sha256=stored.sha256)

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        return list(pool.map(upload, files))


def commit_folder(root: RunRoot, folder: str, manifest: Manifest) -> str:
    """Write the manifest, verify that all its files are in the bucket with the right sizes, check that no later run of
    the job exists, and write COMMIT. Return the sha256 of the manifest.

    Raises Damaged if a file is missing or has another size in the bucket, or if the manifest reads back differently
    than it was written. Raises NewerRun if a later run of the job exists, because the later run may already have
    resumed from an earlier checkpoint. Also raises NewerRun if the folder already has a COMMIT with other content,
    because then another process writes to the folder.
    """
    data = manifest.encode()
    root.write(f"{folder}/{MANIFEST}", data)
    written = root.read(f"{folder}/{MANIFEST}")
    if written != data:
        raise Damaged(f"{folder}/{MANIFEST} reads back as something else than was written")
    start = len(folder) + 1
    check_sizes(folder, manifest, {entry.key[start:]: entry for entry in root.list_objects(f"{folder}/")})
    check_fence(root, manifest.run)
    if not root.create(f"{folder}/{COMMIT}", digest(data).encode()):
        raise NewerRun(f"{folder}/{COMMIT} is somebody else's: another process writes as run {manifest.run}")
    return digest(data)


def read_manifest(root: RunRoot, folder: str) -> tuple[Manifest, str]:
    """Return a committed folder's manifest and the manifest's sha256. Raises Damaged if COMMIT or the manifest is
    missing or malformed, or if the sha256 in COMMIT is not that of the manifest."""
    commit, data = root.read(f"{folder}/{COMMIT}"), root.read(f"{folder}/{MANIFEST}")
    if commit is None:
        raise Damaged(f"{folder}/{COMMIT} is missing")
    text = commit.decode(errors="replace").strip()
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        raise Damaged(f"{folder}/{COMMIT} does not hold a sha256")
    if data is None:
        raise Damaged(f"{folder}/{MANIFEST} is missing")
    if digest(data) != text:
        raise Damaged(f"{folder}/{MANIFEST} is not what was committed (its sha256 is not that in {folder}/{COMMIT})")
    try:
        return Manifest.model_validate_json(data), digest(data)
    except ValidationError as error:
        raise Damaged(f"{folder}/{MANIFEST} is no manifest of this version") from error


def check_sizes(folder: str, manifest: Manifest, files: Mapping[str, ListedObject]) -> None:
    """Raise Damaged if a file of the manifest is missing among ``files``, the folder's objects, or has another size."""
    for file in manifest.files:
        if file.name not in files:
            raise Damaged(f"{folder}/{file.name} is missing")
        if files[file.name].bytes != file.bytes:
            raise Damaged(f"{folder}/{file.name} is not what was committed (it has {files[file.name].bytes} bytes)")
