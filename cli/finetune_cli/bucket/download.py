"""`finetune download`: downloads a job's artifact into a local folder and verifies every file.

The input is the artifact in a FineTuneJob's status, and a client of the job's object store. The output is a folder that
peft or transformers loads. The folder appears only after the whole artifact was verified. The commands and the demo
call `download`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from finetune_cli.bucket.object_store import ObjectStoreReader
from finetune_cli.state import state, state_message, status_of
from finetune_core.api.job import KIND, FineTuneJob
from finetune_core.api.status import ArtifactStatus
from finetune_core.errors import UserError
from finetune_core.layout import COMMIT, MANIFEST, Manifest, digest, parse_uri


def artifact_of(job: FineTuneJob) -> ArtifactStatus:
    """Return the job's artifact. Raises UserError where the job has no artifact yet."""
    artifact = status_of(job).artifact
    if artifact is None:
        subject = f"{KIND} {job.metadata.namespace}/{job.metadata.name}"
        raise UserError(subject, f"has no artifact: its state is {state(job)} ({state_message(job)})")
    return artifact


def download(
    artifact: ArtifactStatus, store: ObjectStoreReader, folder: Path, progress: Callable[[int], None]
) -> Manifest:
    """Download ``artifact`` into the new folder ``folder`` and return the artifact's manifest. Raises UserError where
    ``folder`` exists already or can't be written, where `read_manifest` refuses the manifest, where a file can't be
    read from the object store, or where the size or sha256 of a file differs from the manifest.

    ``progress`` is called with the number of bytes of each downloaded piece, as `ObjectStoreReader.fetch` describes.
    The files are written into a temporary folder, which gets the name ``folder`` after all files are verified.
    """
    if folder.exists():
        raise UserError(str(folder), "exists already; choose another folder with `-o`")
    manifest = read_manifest(artifact, store)
    place = parse_uri(artifact.uri)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(str(folder.parent), f"cannot be written ({error.strerror})") from error
    try:
        for file in manifest.files:
            target = partial / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            key = place.key(file.name)
            found = store.fetch(place.bucket, key, target, progress)
            if found != (file.bytes, file.sha256):
                raise UserError(
                    f"s3://{place.bucket}/{key}",
                    f"is not what was committed: {found[0]} bytes, sha256 {found[1][:12]}…;"
                    f" {MANIFEST} says {file.bytes} bytes, sha256 {file.sha256[:12]}…",
                )
        (partial / MANIFEST).write_bytes(manifest.encode())
        # mkdtemp made the folder readable for its owner only. So the folder gets the permissions that this process
        # gives to a new folder, which are 0o777 without the bits of the umask.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        partial.rename(folder)
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read_manifest(artifact: ArtifactStatus, store: ObjectStoreReader) -> Manifest:
    """Return the artifact's manifest. Raises UserError where the manifest's sha256 differs from the sha256 in the job's
    status or in the object COMMIT, where the manifest was written by another version of the trainer, or where the
    manifest names a file outside the artifact's folder."""
    place = parse_uri(artifact.uri)
    committed = store.read(place.bucket, place.key(COMMIT)).decode(errors="replace").strip()
    encoded = store.read(place.bucket, place.key(MANIFEST))
    subject = place.uri(MANIFEST)
    if not digest(encoded) == artifact.manifest_sha256 == committed:
        raise UserError(subject, "is not the manifest that the job's status and COMMIT name; the folder was changed")
    try:
        manifest = Manifest.model_validate_json(encoded)
    except ValidationError as error:
        raise UserError(subject, "was written by another version of the trainer") from error
    for file in manifest.files:
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(subject, f"names a file outside its folder: {file.name}")
    return manifest
