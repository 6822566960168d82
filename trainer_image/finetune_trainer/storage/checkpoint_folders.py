"""Checkpoint folders in the bucket, `checkpoints/<run>-<step>/`: download with verification, inventory and retention.
The modules of `checkpoints/` call this module.

The folders follow the commit protocol of `commit.py`. A folder whose bytes do not match its manifest is skipped, and
the reason is reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from finetune_core.contract import CheckpointRecord, ContractModel
from finetune_core.layout import COMMIT, TRAINER_FILE, Manifest, ManifestFile, checkpoint_folder
from finetune_trainer.storage.client import ListedObject
from finetune_trainer.storage.commit import PARALLEL_TRANSFERS, Damaged, check_sizes, read_manifest
from finetune_trainer.storage.lineage import CheckpointId, check_fence
from finetune_trainer.storage.root import RunRoot

STATE_GLOB = "state-*.safetensors"
OWN_FILES = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]*\.(safetensors|json)")
"""Names of the files that are downloaded from a checkpoint. Any other file is ignored, even if the manifest names
it.
"""
DAMAGE_LENGTH = 256


class TrainerState(ContractModel):
    """`trainer.json` of a checkpoint: the part of the training state that is not a tensor.

    No state of random number generators is stored, because the order of rows follows from (seed, epoch) and dropout
    from (seed, step).
    """

    version: int = 1
    step: int
    """Global batches consumed so far. Together with batch size and seed, this number determines the position in the
    data."""
    epoch: int
    batch_in_epoch: int
    seed: int
    updates: int
    """Optimizer updates applied so far, which is the step count of AdamW."""
    tokens: int
    """Supervised tokens trained on so far."""
    world_size: int
    zero_stage: int
    rows: int
    """Number of training rows, with which a resuming run detects that the data has changed."""
    data_sha256: str | None = None
    """sha256 of the token ids of all training rows."""
    perplexity: float | None = None
    """Validation perplexity at this step, if the step was evaluated."""
    task_score: float | None = None
    """Share of correct answers on the validation set at this step, if the best checkpoint is chosen by task score."""
    best_perplexity: float | None = None
    base_sha256: str | None = None
    """sha256 of the base model's weights in a LoRA run, whose checkpoints do not hold these weights."""
    rows_sha256: str | None = None
    """sha256 of the extended base model in a LoRA run with added tokens. The embedding rows of the added tokens are as
    they were initialized from the seed."""


def fetch_folder(root: RunRoot, folder: str, target: Path) -> tuple[Manifest, str]:
    """Download a committed checkpoint into ``target`` and verify the sha256 of every file. Return the manifest and its
    sha256.

    Raises Damaged with the key of the damaged object. Only safetensors and JSON files are downloaded, even if the
    manifest names other files, because other formats, such as pickle, may execute code when they are opened.
    """
    manifest, manifest_sha256 = read_manifest(root, folder)
    target.mkdir(parents=True, exist_ok=True)

    def fetch(file: ManifestFile) -> None:
        # A file with a wrong digest is downloaded once more before it counts as damaged, because the error may have
        # happened in transit.
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
    """Raise Damaged if `trainer.json` or a state file of a downloaded checkpoint can't be parsed."""
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
    """Return the objects of each checkpoint folder, by checkpoint and file name."""
    folders: dict[CheckpointId, dict[str, ListedObject]] = {}
    for entry in entries:
        match = re.fullmatch(r"checkpoints/(\d+)-(\d+)/(.+)", entry.key)
        if match:
            folders.setdefault(CheckpointId(int(match[1]), int(match[2])), {})[match[3]] = entry
    return folders


def committed(root: RunRoot) -> list[CheckpointId]:
    """Return all checkpoints that have a COMMIT object, ordered by run and step."""
    return sorted(key for key, files in _folders(root.list_objects("checkpoints/")).items() if COMMIT in files)


def uncommitted(root: RunRoot) -> list[CheckpointId]:
    """Return the checkpoints that have objects in the bucket but no COMMIT, ordered by run and step."""
    return sorted(key for key, files in _folders(root.list_objects("checkpoints/")).items() if COMMIT not in files)


def inventory(root: RunRoot, damaged: Mapping[str, str] | None = None) -> list[CheckpointRecord]:
    """Return the records of all committed checkpoints, ordered by run and step.

    ``damaged`` maps folders that are known to be damaged to the reason. Damage that shows in sizes, manifest or
    `trainer.json` is added, because these are read anyway; the other files are not downloaded.
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
    """Return the checkpoints of a lineage that retention keeps: the ``keep_last`` newest (at least one), the
    ``keep_best`` best, and the parent of the run."""
    kept = {*newest_first[: max(1, keep_last)], *best_first[:keep_best]}
    return kept | ({parent} if parent is not None else set())


def apply_retention(root: RunRoot, run: int, keep: Collection[CheckpointId]) -> list[CheckpointId]:
    """Delete every checkpoint folder that is not in ``keep`` and is older than the newest committed checkpoint of
    ``run``. Return the deleted checkpoints that were committed.

    Nothing is deleted before ``run`` has committed a checkpoint of its own. Newer folders are left alone, because their
    upload may still be running. COMMIT is deleted first, so that a folder that is deleted only in part no longer counts
    as a checkpoint and the next retention deletes the rest.

    Raises NewerRun if a later run exists, because the later run may be reading a checkpoint. The fence is checked again
    before each folder, because this process may have been frozen for a while at any point.
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
