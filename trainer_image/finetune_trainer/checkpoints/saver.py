"""Commits checkpoints of a running gang and knows which ones exist: last, best, the run's lineage.

`save` takes a snapshot, a short collective that training waits for, and hands it to a background thread (`uploads`):
there each rank uploads its own files, and rank 0 commits once it has heard of all of them. The threads meet at the
rendezvous store, so that no rank sits in a collective while another one talks to the bucket.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from finetune_core.api.evaluation import BestBy
from finetune_core.contract import CheckpointRecord, StorageConfig
from finetune_core.layout import Manifest, ManifestFile, checkpoint_folder
from finetune_trainer.checkpoints.start import Start
from finetune_trainer.checkpoints.uploads import Snapshot, Uploads
from finetune_trainer.decisions.selection import best_first
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.state import snapshot, write_snapshot
from finetune_trainer.pod.errors import NewerRun, OutsideFailure
from finetune_trainer.pod.settings import BACKGROUND_BUDGET_SECONDS, STOP_COMMIT_SECONDS
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.storage.checkpoints import (
    TRAINER_FILE,
    Damaged,
    TrainerState,
    commit_folder,
    retain,
    to_keep,
    upload_files,
)
from finetune_trainer.storage.lineage import CheckpointId
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.steplog import StepRow, write_segment

MOST_WAITING = 4
WAITING_BYTES = 1 << 30
"""Snapshots that wait for the one under way, and a rank's memory for them; beyond one of both the newest replaces
those that wait: a store that was away is not fed with what retention deletes at once."""
DRAIN_SECONDS = 0.2
"""How often ranks that wait for the last COMMIT look at each other."""
MOST_UPLOADS = 3
"""Tries to bring a checkpoint to the bucket whose listing then shows something else than was uploaded."""
SLOW_UPLOAD_SECONDS = 120.0
"""An upload that takes longer while the next checkpoint waits is worth a word to a person."""


def is_due(storage: StorageConfig, step: int, elapsed: float) -> bool:
    """Return whether a checkpoint is due after ``step``, ``elapsed`` seconds after the last snapshot."""
    if storage.checkpoint_every_steps is not None:
        return step % storage.checkpoint_every_steps == 0
    return storage.checkpoint_every_minutes is not None and elapsed >= 60 * storage.checkpoint_every_minutes


class Saver:
    """The checkpoints of this run."""

    def __init__(
        self,
        gang: Gang,
        root: RunRoot,
        start: Start,
        folder: Path,
        storage: StorageConfig,
        best_by: BestBy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Continue from ``start``; snapshots are written into ``folder`` on their way to the bucket."""
        self._gang = gang
        self._meeting = gang.background()
        self._root = root.patient(BACKGROUND_BUDGET_SECONDS, self._heard)
        self._keeper = root
        self._run = self.run = start.run
        self._parent = CheckpointId(start.parent.run, start.parent.step) if start.parent else None
        self._ground = start.ground.model_dump()
        self._folder = folder
        self._storage = storage
        self._best_by = best_by
        self._clock = clock
        self._segment = 0
        self._number = 0
        self._saved_at = self._committed_at = self._begun_at = clock()
        self._failing = self._retention_problem = ""
        self.lineage: Sequence[CheckpointRecord] = tuple(start.ancestors)
        """Committed checkpoints that lead to now, oldest first; replaced as a whole, also by the background thread."""
        self._others = tuple(start.others)
        self._uploads = Uploads(self._upload)

    # What there is

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

    @property
    def failed(self) -> bool:
        """Whether the background thread gave up: all ranks have to leave (`raise_failure`)."""
        return self._uploads.failure is not None

    @property
    def age_seconds(self) -> float:
        """Seconds since the newest COMMIT of this run, or since its beginning: what a lost pod would cost."""
        return self._clock() - self._committed_at

    @property
    def problem(self) -> str:
        """Why that age grows beyond what the job asks for, as a sentence; empty while it does not."""
        step, elapsed = self._uploads.current_step, self._clock() - self._begun_at
        if step is None:
            return self._retention_problem
        if self._failing:
            return f"the checkpoint of step {step} can't be committed, training goes on: {self._failing}"
        if elapsed > SLOW_UPLOAD_SECONDS and self._saved_at > self._begun_at:
            return f"the upload of step {step} takes longer than the time between two checkpoints: {elapsed:.0f} s"
        return self._retention_problem

    def take_committed(self) -> list[CheckpointRecord]:
        """Return the records of checkpoints that were committed since the last call."""
        return self._uploads.take_done()

    # In the training thread

    def due(self, step: int) -> bool:
        """Return whether the job asks for a checkpoint after ``step``; a collective where minutes count."""
        due = is_due(self._storage, step, self._clock() - self._saved_at)
        if self._storage.checkpoint_every_steps is not None:
            return due
        return self._gang.agree(self._gang.is_first and due)

    def save(self, engine: Engine, state: TrainerState, rows: Sequence[StepRow], *, must: bool = False) -> None:
        """Take a snapshot of the engine's state and leave the rest to the background; all ranks call it.

        ``rows`` are the steps since the last save, from rank 0. ``must``: a later checkpoint does not make up for
        this one.
        """
        gang = self._gang
        tensors = snapshot(engine, rank=gang.rank, world_size=gang.world_size)
        self._number += 1
        taken = Snapshot(self._number, state.model_copy(update=self._ground), tensors, rows, must)
        with self._uploads.held() as waiting:
            # A run that was told to stop has no time for what its last checkpoint makes up for.
            full = waiting.count >= MOST_WAITING or waiting.bytes + taken.bytes > WAITING_BYTES
            if gang.agree(full or gang.told()):
                # What has begun on one rank has to be finished by all.
                begun = gang.most((waiting.first or self._number) - 1)
                taken.rows = [*waiting.drop(waiting.replaceable(begun)), *rows]
            self._uploads.put(taken)
        self._saved_at = self._clock()

    def drain(self, stop: Callable[[], bool], *, bound: float = STOP_COMMIT_SECONDS) -> None:
        """Wait until everything is committed; all ranks call it, and look at each other meanwhile.

        Once one of them was told to stop they wait at most ``bound`` seconds more; then OutsideFailure.
        """
        told_at: float | None = None
        while True:
            self._uploads.wait(DRAIN_SECONDS)
            busy, told, failed = self._gang.total([self._uploads.busy, stop(), self.failed])
            if failed:
                self.raise_failure()
            if not busy:
                return
            now = self._clock()
            told_at = now if told and told_at is None else told_at
            if self._gang.agree(told_at is not None and now - told_at > bound):
                raise OutsideFailure(
                    f"told to stop, but the last checkpoint could not be committed within {bound:.0f} s"
                    + (f": {self._failing}" if self._failing else "")
                )

    def raise_failure(self) -> None:
        """Raise what ended the background thread of any rank, on all of them; all ranks call it."""

        def own() -> None:
            if self._uploads.failure is not None:
                raise self._uploads.failure

        self._gang.together(own)

    # In the background thread

    def _heard(self, sentence: str) -> None:
        self._failing = sentence

    def _upload(self, taken: Snapshot) -> CheckpointRecord:
        """Upload this rank's files, then let rank 0 commit; returns the record on every rank."""
        self._begun_at = self._clock()
        meeting = self._meeting
        target = checkpoint_folder(self._run, taken.state.step)
        local = self._folder / target
        local.mkdir(parents=True, exist_ok=True)

        files = write_snapshot(taken.tensors, local, rank=meeting.rank, world_size=meeting.world_size)
        taken.tensors = {}
        if meeting.is_first:
            (local / TRAINER_FILE).write_text(taken.state.to_json())
            files.append(local / TRAINER_FILE)

        def upload() -> list[dict[str, object]]:
            return [file.model_dump() for file in upload_files(self._root, target, files)]

        def commit() -> dict[str, object]:
            stored = [ManifestFile.model_validate(file) for own in uploaded for file in own]
            try:
                return self._commit(target, stored, taken.state, taken.rows).model_dump(mode="json")
            except Damaged as damage:
                return {"again": str(damage)}

        for _ in range(MOST_UPLOADS):
            uploaded = meeting.each(upload)
            answer = meeting.share(commit)
            if "again" not in answer:
                break
            self._heard(answer["again"])
        else:
            raise OutsideFailure(f"{answer['again']}, {MOST_UPLOADS} times in a row")
        self._heard("")
        record = CheckpointRecord.model_validate(answer)
        self._committed_at = self._clock()
        shutil.rmtree(local, ignore_errors=True)
        if not meeting.is_first:
            self.lineage = (*self.lineage, record)
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
        self.lineage = (*self.lineage, record)
        self._retain()
        return record

    def _retain(self) -> None:
        """Delete what the job does not keep. The parent of the run stays until the job ends: it is what a crash of
        the next start falls back to."""
        keep = to_keep(
            [_id(record) for record in reversed(self.lineage)],
            [_id(record) for record in best_first(self.lineage, self._best_by)],
            keep_last=self._storage.keep_last,
            keep_best=self._storage.keep_best,
            parent=self._parent,
        )
        try:
            retain(self._keeper, self._run, keep)
        except NewerRun:
            raise
        except OutsideFailure as failure:
            # The run goes on with more in the bucket than it should: a policy may allow to write and not to delete.
            self._retention_problem = f"old checkpoints can't be deleted: {failure}"
            return
        self._retention_problem = ""
        self.lineage = tuple(record for record in self.lineage if _id(record) in keep)
        self._others = ()


def _id(record: CheckpointRecord) -> CheckpointId:
    return CheckpointId(record.run, record.step)
