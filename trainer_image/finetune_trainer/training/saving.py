"""Commits checkpoints of a running gang and knows which ones exist: last, best, the run's lineage.

Snapshot (a collective, short) and upload (each rank its own files, no collective) are apart, so that the upload can
move to the background.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from finetune_core.contract import CheckpointRecord, StorageConfig
from finetune_core.layout import Manifest, ManifestFile, checkpoint_folder
from finetune_trainer.storage.checkpoints import (
    TRAINER_FILE,
    TrainerState,
    commit_folder,
    retain,
    to_keep,
    upload_files,
)
from finetune_trainer.storage.lineage import CheckpointId
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.steplog import StepRow, write_segment
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.gang import Gang
from finetune_trainer.training.selection import BestBy, best_first
from finetune_trainer.training.start import Start
from finetune_trainer.training.state import snapshot, write_snapshot


class Saver:
    """The checkpoints of this run."""

    def __init__(
        self, gang: Gang, root: RunRoot, start: Start, folder: Path, storage: StorageConfig, best_by: BestBy
    ) -> None:
        """Continue from ``start``; snapshots are written into ``folder`` on their way to the bucket."""
        self._gang = gang
        self._root = root
        self._run = self.run = start.run
        self._parent = CheckpointId(start.parent.run, start.parent.step) if start.parent else None
        self._folder = folder
        self._storage = storage
        self._best_by = best_by
        self._segment = 0
        self.lineage = list(start.ancestors)
        """Committed checkpoints that lead to now, oldest first."""
        self._others = list(start.others)

    @property
    def committed(self) -> list[CheckpointRecord]:
        """All committed checkpoints in the bucket, oldest first."""
        return sorted([*self._others, *self.lineage], key=lambda record: (record.run, record.step))

    @property
    def last(self) -> CheckpointRecord | None:
        """The newest checkpoint of the lineage."""
        return self.lineage[-1] if self.lineage else None

    @property
    def best(self) -> CheckpointRecord | None:
        """The checkpoint of the lineage that evaluation.bestBy names the best."""
        return next(iter(best_first(self.lineage, self._best_by)), None)

    def chosen(self, artifact_from: Literal["Best", "Last"]) -> CheckpointRecord:
        """Return the checkpoint that the artifact is made of; the last step's is always committed."""
        return (self.best if artifact_from == "Best" else None) or self.lineage[-1]

    def save(self, engine: Engine, state: TrainerState, rows: Sequence[StepRow]) -> CheckpointRecord:
        """Commit the engine's state; all ranks call it, and return when COMMIT is written.

        ``rows`` are the steps since the last save, from rank 0.
        """
        gang = self._gang
        tensors = snapshot(engine, rank=gang.rank, world_size=gang.world_size)
        target = checkpoint_folder(self._run, state.step)
        local = self._folder / target
        local.mkdir(parents=True, exist_ok=True)

        def upload() -> list[dict[str, object]]:
            files = write_snapshot(tensors, local, rank=gang.rank, world_size=gang.world_size)
            if gang.is_first:
                (local / TRAINER_FILE).write_text(state.to_json())
                files.append(local / TRAINER_FILE)
            uploaded = upload_files(self._root, target, files)
            for file in files:
                file.unlink()
            return [file.model_dump() for file in uploaded]

        uploaded = gang.each(upload)
        files = [ManifestFile.model_validate(file) for own in uploaded for file in own]

        def commit() -> dict[str, object]:
            return self._commit(target, files, state, rows).model_dump(mode="json")

        record = CheckpointRecord.model_validate(gang.share(commit))
        shutil.rmtree(local, ignore_errors=True)
        if not gang.is_first:
            self.lineage.append(record)
        return record

    def _commit(
        self, folder: str, files: list[ManifestFile], state: TrainerState, rows: Sequence[StepRow]
    ) -> CheckpointRecord:
        """Write step log, manifest and COMMIT, then delete what retention does not keep; rank 0 only."""
        if rows:
            self._segment += 1
            write_segment(self._root, self._run, self._segment, rows)
        manifest = Manifest(kind="Checkpoint", run=self._run, step=state.step, files=files)
        record = CheckpointRecord(
            run=self._run,
            step=state.step,
            uri=self._root.uri(folder),
            bytes=manifest.total_bytes,
            manifest_sha256=commit_folder(self._root, folder, manifest),
            perplexity=state.perplexity,
            task_score=state.task_score,
            time=datetime.now(UTC),
        )
        self.lineage.append(record)
        self._retain()
        return record

    def _retain(self) -> None:
        keep = to_keep(
            [_id(record) for record in reversed(self.lineage)],
            [_id(record) for record in best_first(self.lineage, self._best_by)],
            keep_last=self._storage.keep_last,
            keep_best=self._storage.keep_best,
            parent=self._parent,
        )
        retain(self._root, self._run, keep)
        self.lineage = [record for record in self.lineage if _id(record) in keep]
        self._others = []


def _id(record: CheckpointRecord) -> CheckpointId:
    return CheckpointId(record.run, record.step)
