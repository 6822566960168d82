"""Checkpoint folders in the bucket, `checkpoints/<run>-<step>/`: download with verification, inventory, and deletion of
old checkpoints (retention). The modules of `checkpoints/` call this module. `train.py` and `finish.py` download
checkpoints with it, and `preflight/former_run.py` lists the committed checkpoints.

The folders are written as `commit.py` describes. For a folder that does not hold what its manifest names,
`fetch_folder` raises Damaged. `inventory` does not read every file. Where it notices damage, it lists the checkpoint as
damaged with the reason.
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
from finetune_trainer.pod.errors import Damaged
from finetune_trainer.storage.commit import PARALLEL_TRANSFERS, check_sizes, read_manifest
from finetune_trainer.storage.lineage import CheckpointId, check_fence
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ListedObject

STATE_GLOB = "state-*.safetensors"
OWN_FILES = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]*\.(safetensors|json)")
"""Pattern of the names of the files that are downloaded from a checkpoint. Any other file is ignored, even if the
manifest names it."""
DAMAGE_LENGTH = 256


class TrainerState(ContractModel):
    """Content of a checkpoint's `trainer.json`: the part of the training state that is not a tensor.

    No state of a random generator is stored, because none is needed: the order of the rows is computed from (seed,
    epoch), and dropout from (seed, step, row).
    """

    version: int = 1
    step: int
    """Number of global batches consumed so far, including those that a rollback left out. Together with batch size,
    seed and number of training examples, it determines the position in the data."""
    epoch: int
    batch_in_epoch: int
    seed: int
    updates: int
    """Number of optimizer updates applied so far. AdamW's step count has the same value."""
    tokens: int
    """Number of supervised tokens trained on so far."""
    world_size: int
    zero_stage: int | None = None
    """None: the checkpoint was made by the plain engine."""
    rows: int
    """Number of training examples. The notice that the data has changed since the checkpoint names this number."""
    data_sha256: str | None = None
    """`PreparationSummary.data_sha256`, the digest of the training rows. If a resuming run has another digest, the data
    has changed."""
    validation_sha256: str | None = None
    """The digest of the validation rows in `PreparationSummary.evaluation_sha256`. None if the job has no validation
    rows."""
    perplexity: float | None = None
    """Validation perplexity after this step, or None if the step was not evaluated."""
    task_score: float | None = None
    """Value of the task's main score on the validation rows after this step. None if the step was not evaluated, or if
    `evaluation.bestBy` is not TaskScore."""
    best_perplexity: float | None = None
    base_sha256: str | None = None
    """sha256 of the base model's weights, which the checkpoints of a LoRA run do not hold. None for a full run."""
    rows_sha256: str | None = None
    """sha256 of the extended base model: a copy with embedding rows for added tokens, with an untied output head or
    with a merged adapter. None if the base model was not extended, or if the run trains all weights."""


def fetch_folder(root: RunRoot, folder: str, target: Path) -> tuple[Manifest, str]:
    """Download a committed checkpoint into ``target`` and verify the sha256 of every downloaded file. Return the
    manifest and the manifest's sha256.

    Only safetensors and JSON files are downloaded, even if the manifest names others. Files of other formats, such as
    pickle, may execute code when they are opened. Raises Damaged with the key of the damaged object.
    """
    manifest, manifest_sha256 = read_manifest(root, folder)
    target.mkdir(parents=True, exist_ok=True)

    def fetch(file: ManifestFile) -> None:
        # A file with a wrong sha256 is downloaded a second time, because the bytes may have changed in transit. If the
        # sha256 is wrong again, the file counts as damaged.
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
    """Raise Damaged if `trainer.json` of a downloaded checkpoint is missing or can't be parsed, or if a safetensors
    file of the training state can't be opened."""
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
    """Group a listing by checkpoint: return the objects of each checkpoint folder by file name."""
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
    """Return a record of each committed checkpoint, ordered by run and step. A damaged checkpoint has the reason in its
    record.

    ``damaged`` gives the reason for folders that are already known to be damaged. Damage in other folders is noticed
    where COMMIT, the manifest or `trainer.json` can't be read, or where a file does not have the size that the manifest
    names. No other file is read.
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
    """Return which checkpoints to keep, of those that led to the current weights: the ``keep_last`` newest (at least
    one), the ``keep_best`` best, and ``parent``, from which the run resumed."""
    kept = {*newest_first[: max(1, keep_last)], *best_first[:keep_best]}
    return kept | ({parent} if parent is not None else set())


def apply_retention(root: RunRoot, run: int, keep: Collection[CheckpointId]) -> list[CheckpointId]:
    """Delete the checkpoint folders that are not in ``keep`` and that come before the newest committed checkpoint of
    ``run`` in the order of run and step. Return the deleted checkpoints that had a COMMIT.

    Nothing is deleted before ``run`` has committed a checkpoint of its own. Folders that come after the newest of its
    committed checkpoints stay, because their upload may still be running. In a folder that is deleted, COMMIT is
    deleted first, so that a half-deleted folder no longer counts as a checkpoint. The next retention deletes the rest
    of such a folder.

    Raises NewerRun if a later run of the job exists, because that run may be reading a checkpoint. The check is
    repeated before each folder, because this process may have been frozen for a while.
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
