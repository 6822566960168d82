"""Extended base models, in `<storage.uri>/_bases/<digest>/` of the bucket: base models with embedding rows for added
tokens, with an untied output head or with a merged adapter. If the artifact of a job is an adapter of an extended base
model, the job uploads this model, and the adapter names the model's folder. All jobs with the same extended base model
share one folder.

The digest is the sha256 of the manifest, so equal content has an equal folder name. `finish.py` calls `publish_base`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_core.layout import BASES, COMMIT, MANIFEST, Location, Manifest, ManifestFile, digest
from finetune_trainer.pod.errors import Damaged
from finetune_trainer.storage.commit import PARALLEL_TRANSFERS, upload_files
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import digest_of_file

EXTENDED_BASE_PROBE = "rehearsal"
"""Name of the empty object that a run writes beside the extended base models, and deletes again, to test the store. No
folder of a model has this name, because folders are named after digests."""


def extended_bases_root(root: RunRoot) -> RunRoot:
    """Return the folder of all extended base models in the bucket, `<uri>/_bases`. ``root`` is the folder of a job's
    runs, `<uri>/<namespace>/<name>/<runId>`."""
    parts = root.location.prefix.split("/")[:-3]
    return RunRoot(root.store, Location(root.location.bucket, "/".join([*parts, BASES])))


def publish_base(root: RunRoot, folder: Path) -> str:
    """Upload the model in ``folder`` unless the bucket holds it already. Return the model's `s3://` address.

    Two jobs can upload the same model at the same time without harm, because both write the same bytes to the same
    keys. Raises Damaged if a file in ``folder`` changed while it was uploaded.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        described = list(pool.map(_manifest_file, files))
    manifest = Manifest(kind="Base", run=0, step=0, files=described)
    bases, key = extended_bases_root(root), digest(manifest.encode())
    if bases.read(f"{key}/{COMMIT}") is None:
        uploaded = upload_files(bases, key, files)
        if uploaded != described:
            raise Damaged(f"{bases.uri(key)} is not what was sent")
        bases.write(f"{key}/{MANIFEST}", manifest.encode())
        bases.create(f"{key}/{COMMIT}", key.encode())
    return bases.uri(key)


def _manifest_file(path: Path) -> ManifestFile:
    content = digest_of_file(path)
    return ManifestFile(name=path.name, bytes=content.bytes, sha256=content.sha256)
