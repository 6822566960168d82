"""Checkpoints in the bucket: files, manifest, COMMIT last; verified reading, inventory, retention.

Nothing without COMMIT exists. COMMIT holds the manifest's sha256, the manifest each file's: what was read back
is what was written, or it is passed over with a sentence that says why.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_core.contract import CheckpointRecord, ContractModel
from finetune_core.layout import COMMIT, MANIFEST, Manifest, ManifestFile, checkpoint_folder, digest
from finetune_trainer.errors import OutsideFailure
from finetune_trainer.storage.client import Entry
from finetune_trainer.storage.lineage import CheckpointId, check_fence
from finetune_trainer.storage.root import RunRoot

TRAINER_FILE = "trainer.json"
PARALLEL_TRANSFERS = 4


class Damaged(OutsideFailure):
    """A committed folder whose bytes are not those that its manifest names; the message names the object."""


class TrainerState(ContractModel):
    """`trainer.json` of a checkpoint: all of the training state that is not a tensor.

    There is no state of random generators to keep: the order of rows and dropout follow from (seed, epoch) and
    (seed, step).
    """

    version: int = 1
    step: int
    """Global batches consumed; with the batch size and the seed it is the cursor in the data."""
    epoch: int
    batch_in_epoch: int
    seed: int
    updates: int
    """Optimizer updates applied: AdamW's step count."""
    tokens: int
    """Supervised tokens seen."""
    world_size: int
    zero_stage: int
    rows: int
    """Training rows, to notice that the data changed."""
    perplexity: float | None = None
    """Validation perplexity at this step, where it was scored."""
    best_perplexity: float | None = None


def upload_files(root: RunRoot, folder: str, files: Sequence[Path]) -> list[ManifestFile]:
    """Upload ``files`` into ``folder`` and return what the manifest says about them."""

    def upload(path: Path) -> ManifestFile:
        stored = root.upload(f"{folder}/{path.name}", path)
        return ManifestFile(name=path.name, bytes=stored.bytes, sha256=stored.sha256)

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        return list(pool.map(upload, files))


def commit_folder(root: RunRoot, folder: str, manifest: Manifest) -> str:
    """Write the manifest, look at the fence, write COMMIT; return the manifest's sha256.

    Raises NewerRun where a later run exists: its lineage must not change any more.
    """
    data = manifest.encode()
    root.write(f"{folder}/{MANIFEST}", data)
    check_fence(root, manifest.run)
    root.create(f"{folder}/{COMMIT}", digest(data).encode())
    return digest(data)


def read_manifest(root: RunRoot, folder: str) -> tuple[Manifest, str]:
    """Return a committed folder's manifest and its sha256; raises Damaged where they don't fit together."""
    commit, data = root.read(f"{folder}/{COMMIT}"), root.read(f"{folder}/{MANIFEST}")
    if commit is None:
        raise Damaged(f"{folder}/{COMMIT} is missing")
    if data is None:
        raise Damaged(f"{folder}/{MANIFEST} is missing")
    if digest(data) != commit.decode(errors="replace").strip():
        raise Damaged(f"{folder}/{MANIFEST} is not what was committed")
    return Manifest.model_validate_json(data), digest(data)


def fetch_folder(root: RunRoot, folder: str, target: Path) -> tuple[Manifest, str]:
    """Download a committed folder and verify every byte; raises Damaged with the object's key."""
    manifest, manifest_sha256 = read_manifest(root, folder)
    target.mkdir(parents=True, exist_ok=True)

    def fetch(file: ManifestFile) -> None:
        stored = root.download(f"{folder}/{file.name}", target / file.name)
        if stored is None:
            raise Damaged(f"{folder}/{file.name} is missing")
        if stored.sha256 != file.sha256:
            raise Damaged(f"{folder}/{file.name} is not what was committed (its sha256 differs)")

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(fetch, manifest.files))
    return manifest, manifest_sha256


def _folders(entries: Sequence[Entry]) -> dict[CheckpointId, dict[str, Entry]]:
    """Return the objects of each checkpoint folder by file name."""
    folders: dict[CheckpointId, dict[str, Entry]] = {}
    for entry in entries:
        match = re.fullmatch(r"checkpoints/(\d+)-(\d+)/(.+)", entry.key)
        if match:
            folders.setdefault(CheckpointId(int(match[1]), int(match[2])), {})[match[3]] = entry
    return folders


def committed(root: RunRoot) -> list[CheckpointId]:
    """Return all committed checkpoints, by run and step."""
    return sorted(key for key, files in _folders(root.entries("checkpoints/")).items() if COMMIT in files)


def inventory(root: RunRoot) -> list[CheckpointRecord]:
    """Return the records of all committed checkpoints whose manifest can be read, oldest first."""
    records = []
    for checkpoint, files in sorted(_folders(root.entries("checkpoints/")).items()):
        if COMMIT not in files:
            continue
        folder = checkpoint_folder(*checkpoint)
        try:
            manifest, manifest_sha256 = read_manifest(root, folder)
        except Damaged:
            continue  # Resume says what is wrong with it when it passes it over.
        state = root.read(f"{folder}/{TRAINER_FILE}")
        records.append(
            CheckpointRecord(
                run=checkpoint.run,
                step=checkpoint.step,
                uri=root.uri(folder),
                bytes=manifest.total_bytes,
                manifest_sha256=manifest_sha256,
                perplexity=TrainerState.model_validate_json(state).perplexity if state else None,
                time=files[COMMIT].modified,
            )
        )
    return records


def to_keep(
    lineage: Sequence[CheckpointId], *, keep_last: int, best: CheckpointId | None, parent: CheckpointId | None
) -> set[CheckpointId]:
    """Return the checkpoints that retention leaves: the newest of the lineage, the best, the run's parent."""
    return {*lineage[:keep_last], *(checkpoint for checkpoint in (best, parent) if checkpoint is not None)}


def retain(root: RunRoot, run: int, keep: Collection[CheckpointId]) -> list[CheckpointId]:
    """Delete every checkpoint folder of this and older runs that is not in ``keep``; return those deleted.

    Only after a COMMIT of ``run`` itself. COMMIT goes first, so that a crash in the middle leaves nothing that
    looks whole. Raises NewerRun before anything is deleted where a later run may be reading.
    """
    entries = root.entries("checkpoints/")
    doomed = {key: files for key, files in _folders(entries).items() if key not in keep and key.run <= run}
    if doomed:
        check_fence(root, run)
    for files in doomed.values():
        root.delete([files[COMMIT].key] if COMMIT in files else [])
        root.delete([entry.key for name, entry in files.items() if name != COMMIT])
    return sorted(key for key, files in doomed.items() if COMMIT in files)
