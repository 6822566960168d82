"""Checkpoints in the bucket: files, manifest, COMMIT last; verified reading, inventory, retention.

Nothing without COMMIT exists. COMMIT holds the manifest's sha256, the manifest each file's: what was read back
is what was written, or it is passed over with a sentence that says why.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from finetune_core.contract import CheckpointRecord, ContractModel
from finetune_core.layout import COMMIT, Manifest, ManifestFile, checkpoint_folder
from finetune_trainer.storage.client import ListedObject
from finetune_trainer.storage.commit import PARALLEL_TRANSFERS, Damaged, check_sizes, read_manifest
from finetune_trainer.storage.lineage import CheckpointId, check_fence
from finetune_trainer.storage.root import RunRoot

TRAINER_FILE = "trainer.json"
STATE_GLOB = "state-*.safetensors"
OWN_FILES = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]*\.(safetensors|json)")
"""What is read of a checkpoint: whatever else a manifest names is not even fetched."""
DAMAGE_LENGTH = 256


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
    data_sha256: str | None = None
    """Of the training rows as token ids."""
    perplexity: float | None = None
    """Validation perplexity at this step, where it was scored."""
    task_score: float | None = None
    """Share of right answers at this step, where they choose the best checkpoint."""
    best_perplexity: float | None = None
    base_sha256: str | None = None
    """Of a LoRA run: digest of the base model's weights, which the checkpoint does not hold."""
    rows_sha256: str | None = None
    """Of a LoRA run with added tokens: digest of the base extended by their rows, as they were drawn from the seed."""


def fetch_folder(root: RunRoot, folder: str, target: Path) -> tuple[Manifest, str]:
    """Download a committed checkpoint and verify every byte; raises Damaged with the object's key.

    Only safetensors and JSON files are fetched: what else lies there, or stands in the manifest, is never opened.
    """
    manifest, manifest_sha256 = read_manifest(root, folder)
    target.mkdir(parents=True, exist_ok=True)

    def fetch(file: ManifestFile) -> None:
        # Once more before it counts as damaged: the network may flip bits too.
        for last_try in (False, True):
            stored = root.download(f"{folder}/{file.name}", target / file.name)
            if stored is None:
                raise Damaged(f"{folder}/{file.name} is missing")
            if stored.sha256 == file.sha256:
                return
            if last_try:
                difference = "its sha256 differs" if stored.bytes == file.bytes else f"it has {stored.bytes} bytes"
                raise Damaged(f"{folder}/{file.name} is not what was committed ({difference})")

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(fetch, (file for file in manifest.files if OWN_FILES.fullmatch(file.name))))
    return manifest, manifest_sha256


def check_readable(folder: Path) -> None:
    """Raise Damaged where the files of a fetched checkpoint are not of the formats that their names say."""
    try:
        TrainerState.model_validate_json((folder / TRAINER_FILE).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{TRAINER_FILE} is not among its files") from error
    except ValidationError as error:
        raise Damaged(f"{TRAINER_FILE} is not a training state of this version") from error
    for path in sorted(folder.glob(STATE_GLOB)):
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise Damaged(f"{path.name} is no safetensors file ({error})") from error


def _folders(entries: Sequence[ListedObject]) -> dict[CheckpointId, dict[str, ListedObject]]:
    """Return the objects of each checkpoint folder by file name."""
    folders: dict[CheckpointId, dict[str, ListedObject]] = {}
    for entry in entries:
        match = re.fullmatch(r"checkpoints/(\d+)-(\d+)/(.+)", entry.key)
        if match:
            folders.setdefault(CheckpointId(int(match[1]), int(match[2])), {})[match[3]] = entry
    return folders


def committed(root: RunRoot) -> list[CheckpointId]:
    """Return all committed checkpoints, by run and step."""
    return sorted(key for key, files in _folders(root.list_objects("checkpoints/")).items() if COMMIT in files)


def uncommitted(root: RunRoot) -> list[CheckpointId]:
    """Return the checkpoints of which something lies in the bucket, but no COMMIT."""
    return sorted(key for key, files in _folders(root.list_objects("checkpoints/")).items() if COMMIT not in files)


def inventory(root: RunRoot, damaged: Mapping[str, str] | None = None) -> list[CheckpointRecord]:
    """Return the records of all committed checkpoints, oldest first.

    ``damaged`` says what is known to be wrong, by folder; what shows already in sizes and small files is added.
    """
    records = []
    for checkpoint, files in sorted(_folders(root.list_objects("checkpoints/")).items()):
        if COMMIT not in files:
            continue
        folder = checkpoint_folder(*checkpoint)
        wrong = (damaged or {}).get(folder, "")
        manifest, manifest_sha256, perplexity, task_score = None, "", None, None
        try:
            manifest, manifest_sha256 = read_manifest(root, folder)
            check_sizes(folder, manifest, files)
            data = root.read(f"{folder}/{TRAINER_FILE}")
            state = TrainerState.model_validate_json(data) if data else None
            perplexity, task_score = (state.perplexity, state.task_score) if state else (None, None)
        except (Damaged, ValidationError) as error:
            wrong = wrong or (str(error) if isinstance(error, Damaged) else f"{folder}/{TRAINER_FILE} can't be read")
        records.append(
            CheckpointRecord(
                run=checkpoint.run,
                step=checkpoint.step,
                uri=root.uri(folder),
                bytes=manifest.total_bytes if manifest else sum(file.bytes for file in files.values()),
                manifest_sha256=manifest_sha256,
                perplexity=perplexity,
                task_score=task_score,
                time=files[COMMIT].modified,
                damaged=wrong[:DAMAGE_LENGTH],
            )
        )
    return records


def to_keep(
    newest_first: Sequence[CheckpointId],
    best_first: Sequence[CheckpointId],
    *,
    keep_last: int,
    keep_best: int,
    parent: CheckpointId | None,
) -> set[CheckpointId]:
    """Return the checkpoints of a lineage that retention leaves: the newest, the best, the run's parent."""
    kept = {*newest_first[: max(1, keep_last)], *best_first[:keep_best]}
    return kept | ({parent} if parent is not None else set())


def apply_retention(root: RunRoot, run: int, keep: Collection[CheckpointId]) -> list[CheckpointId]:
    """Delete every checkpoint folder of this and older runs that is not in ``keep``; return those deleted.

    Only after a COMMIT of ``run`` itself, and nothing above its newest: that may be on its way. COMMIT goes first,
    so that a crash in the middle leaves nothing that looks whole, and the next retention clears it. Raises NewerRun
    before anything is deleted where a later run may be reading; looked at again before each folder, because a
    frozen process may go on at any point.
    """
    folders = _folders(root.list_objects("checkpoints/"))
    newest = max((key for key, files in folders.items() if key.run == run and COMMIT in files), default=None)
    if newest is None:
        return []
    doomed = {key: files for key, files in folders.items() if key not in keep and key < newest}
    for files in doomed.values():
        check_fence(root, run)
        root.delete([files[COMMIT].key] if COMMIT in files else [])
        root.delete([entry.key for name, entry in files.items() if name != COMMIT])
    return sorted(key for key, files in doomed.items() if COMMIT in files)
