"""Saves checkpoints of a run, and knows which checkpoints exist: the newest, the best, and all that led to the current
weights.

All ranks call `Saver.save` together. The method copies the training state into memory and queues the copy for upload
(`uploads.py`). Training goes on after the copy and does not wait for the upload. A background thread on each rank
uploads the rank's own files, and rank 0 writes COMMIT once all ranks have reported their files. The background threads
communicate through torch's rendezvous store and not by collectives, so that no rank waits in a collective while another
rank talks to the bucket.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from finetune_core.api.evaluation import BestBy
from finetune_core.contract import CheckpointRecord, StorageConfig
from finetune_core.layout import TRAINER_FILE, Manifest, ManifestFile, checkpoint_folder
from finetune_trainer.checkpoints.resume import RunStart
from finetune_trainer.checkpoints.uploads import Snapshot, UploadQueue
from finetune_trainer.decisions.selection import best_first
from finetune_trainer.engine.fragment_snapshot import ALIVE, STATE_BYTES, FragmentSnapshots
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.state import write_snapshot
from finetune_trainer.pod.errors import Damaged, NewerRun, OutsideFailure
from finetune_trainer.pod.settings import BACKGROUND_BUDGET_SECONDS, STOP_COMMIT_SECONDS
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.storage.checkpoint_folders import TrainerState, apply_retention, to_keep
from finetune_trainer.storage.commit import commit_folder, upload_files
from finetune_trainer.storage.lineage import CheckpointId
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.step_log import StepRow, write_segment

MAX_WAITING = 4
WAITING_BYTES = 1 << 30
"""Limits for the snapshots (copies of the training state in memory) that wait while another snapshot is uploaded: how
many may wait, and how many bytes they may take on one rank. Beyond either limit, a new snapshot replaces waiting
snapshots, except the best one. So after an outage of the store, the run does not upload old checkpoints that the
retention would delete at once."""
POLL_SECONDS = 0.2
"""While the ranks wait for the last COMMIT, they tell each other at this interval (seconds) whether they still upload,
have failed, or received SIGTERM."""
MAX_UPLOAD_TRIES = 3
"""How many times at most a checkpoint is uploaded. It is uploaded again where the bucket does not hold the uploaded
files afterwards."""
SLOW_UPLOAD_SECONDS = 120.0
"""An upload that takes more than this many seconds, while the next checkpoint waits, is reported as a problem."""


def is_due(storage: StorageConfig, step: int, elapsed: float) -> bool:
    """Return whether a checkpoint is due after ``step``. ``elapsed`` is the time in seconds since the last snapshot."""
    if storage.checkpoint_every_steps is not None:
        return step % storage.checkpoint_every_steps == 0
    return storage.checkpoint_every_minutes is not None and elapsed >= 60 * storage.checkpoint_every_minutes


def most_alive(engine: TrainingEngine, world_size: int) -> int:
    """Return how many snapshots of the training state of ``engine`` a rank may hold at once: as many as may wait, and
    the one that is being uploaded. Small snapshots, such as those of adapters, may be more than ALIVE."""
    share = STATE_BYTES * sum(math.prod(shape) for shape in engine.parameter_shapes.values()) // world_size
    return max(ALIVE, 1 + min(MAX_WAITING, WAITING_BYTES // max(1, share)))


class Saver:
    """Saves the checkpoints of one run, and knows which checkpoints the bucket holds."""

    def __init__(
        self,
        gang: Gang,
        root: RunRoot,
        start: RunStart,
        folder: Path,
        storage: StorageConfig,
        best_by: BestBy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the background thread that uploads. ``start`` lists the checkpoints that exist already. The files of
        each new checkpoint lie below the local ``folder`` until they are committed."""
        self._gang = gang
        self._background_gang = gang.background()
        self._root = root.for_background(BACKGROUND_BUDGET_SECONDS, self._note_upload_problem)
        self._retention_root = root.telling(self._note_retention_problem)
        self._run = self.run = start.run
        self._parent = CheckpointId(start.parent.run, start.parent.step) if start.parent else None
        self._base_digests = start.base_digests.model_dump()
        self._folder = folder
        self._storage = storage
        self._best_by = best_by
        self._clock = clock
        self._segment = 0
        self._snapshots_taken = 0
        self._snapshot_at = self._committed_at = self._upload_began_at = clock()
        self._upload_problem = self._retention_problem = self._retention_failure = ""
        self._is_failure_reported = False
        self.lineage: Sequence[CheckpointRecord] = tuple(start.ancestors)
        """The committed checkpoints that led to the current weights, oldest first. Only rank 0 removes deleted
        checkpoints from the sequence. The background thread may replace the whole sequence, but never changes it in
        place."""
        self._other_checkpoints = tuple(start.other_checkpoints)
        self._uploads = UploadQueue(self._upload)
        self._snapshots: FragmentSnapshots | None = None

    # Properties and functions that return which checkpoints exist, and how their upload and deletion go

    @property
    def committed(self) -> list[CheckpointRecord]:
        """All committed checkpoints in the bucket, ordered by run and step. On ranks other than rank 0 the list still
        holds deleted checkpoints."""
        return sorted([*self._other_checkpoints, *self.lineage], key=lambda record: (record.run, record.step))

    @property
    def last(self) -> CheckpointRecord | None:
        """The newest of the checkpoints that led to the current weights. None before the first checkpoint."""
        return self.lineage[-1] if self.lineage else None

    @property
    def best(self) -> CheckpointRecord | None:
        """The best, by `evaluation.bestBy`, of the checkpoints that led to the current weights. None where no
        checkpoint was scored."""
        return next(iter(best_first(self.lineage, self._best_by)), None)

    def chosen(self, artifact_from: Literal["Best", "Last"]) -> CheckpointRecord:
        """Return the checkpoint of which the artifact is made. For `Best` this is the best checkpoint if any checkpoint
        was scored. Otherwise it is the newest checkpoint.

        Call this after the checkpoint of the last step was committed, so that there is a checkpoint.
        """
        return (self.best if artifact_from == "Best" else None) or self.lineage[-1]

    @property
    def failed(self) -> bool:
        """Return whether the background thread of this rank ended with an error. All ranks then have to call
        `raise_failure`."""
        return self._uploads.failure is not None

    @property
    def age_seconds(self) -> float:
        """Seconds since this run's newest COMMIT; before the first COMMIT, seconds since this `Saver` was made.

        If the pod were lost now, the training since the snapshot of the newest committed checkpoint would be lost. This
        snapshot is older than the COMMIT by the time that it waited in the queue and by the time of its upload.
        """
        return self._clock() - self._committed_at

    @property
    def problem(self) -> str:
        """Why checkpoints are committed late, as a sentence. Empty where they are not late."""
        step, elapsed = self._uploads.current_step, self._clock() - self._upload_began_at
        if step is None:
            return ""
        if self._upload_problem:
            return f"the checkpoint of step {step} can't be committed, training goes on: {self._upload_problem}"
        if self._retention_problem:
            return (
                f"old checkpoints can't be deleted, so the next one waits, training goes on: {self._retention_problem}"
            )
        if elapsed > SLOW_UPLOAD_SECONDS and self._snapshot_at > self._upload_began_at:
            return f"the upload of step {step} takes longer than the time between two checkpoints: {elapsed:.0f} s"
        return ""

    def take_notices(self) -> list[str]:
        """Return a notice about old checkpoints that can't be deleted, once after the first failure."""
        if not self._retention_failure or self._is_failure_reported:
            return []
        self._is_failure_reported = True
        return [f"old checkpoints can't be deleted, so more than the job asks for stay: {self._retention_failure}"]

    def take_committed(self) -> list[CheckpointRecord]:
        """Return the records of the checkpoints that were committed since the last call."""
        return self._uploads.take_done()

    # Functions that the training thread calls

    def due(self, step: int) -> bool:
        """Return whether the job asks for a checkpoint after ``step``.

        Where the interval is given in minutes, the clock of rank 0 decides, so all ranks must call this function
        together.
        """
        due = is_due(self._storage, step, self._clock() - self._snapshot_at)
        if self._storage.checkpoint_every_steps is not None:
            return due
        return self._gang.any_rank(self._gang.is_first and due)

    def save(self, engine: TrainingEngine, state: TrainerState, rows: Sequence[StepRow], *, best: bool = False) -> None:
        """Copy the engine's state into memory and queue the copy for upload. All ranks call this together.

        ``rows`` are the rows of the step log since the last save, on rank 0; other ranks pass no rows. ``best`` tells
        whether the evaluation after this step is the best so far. Where too many snapshots wait for their upload, and
        after SIGTERM, some waiting snapshots are dropped, but never the best one.
        """
        gang = self._gang
        snapshots = self._snapshots = self._snapshots or FragmentSnapshots(
            engine,
            rank=gang.rank,
            world_size=gang.world_size,
            alive=most_alive(engine, gang.world_size),
            note_progress=gang.note_progress,
        )
        number = self._snapshots_taken = self._snapshots_taken + 1
        with self._uploads.hold() as waiting:
            # Waiting snapshots are dropped where too many wait, before the new one is taken into their memory. They are
            # dropped after SIGTERM too, because then there is little time to upload the last checkpoint.
            full = waiting.count >= MAX_WAITING or waiting.bytes + snapshots.bytes_of_one > WAITING_BYTES
            if gang.any_rank(full or snapshots.free == 0 or gang.stop_requested()):
                # All ranks must finish an upload that one rank has begun. So a snapshot is dropped only if no rank has
                # begun to upload it.
                begun = gang.max_over_ranks((waiting.first or number) - 1)
                rows = [*waiting.drop(waiting.replaceable(begun, best=best)), *rows]
        self._wait_for_memory(snapshots)
        held = snapshots.take()
        new_state = state.model_copy(update=self._base_digests)
        self._uploads.put(Snapshot(number, new_state, held.tensors, rows, best, held.buffer.release))
        self._snapshot_at = self._clock()

    def _wait_for_memory(self, snapshots: FragmentSnapshots) -> None:
        """Wait until every rank can hold one more snapshot. A rank that can't waits until the files of the snapshot
        that is being uploaded are written. All ranks call this together."""
        while True:
            waiting, failed = self._gang.sum_over_ranks([snapshots.free == 0, self.failed])
            if failed:
                self.raise_failure()
            if not waiting:
                return
            self._uploads.wait(POLL_SECONDS)

    def free_memory(self) -> None:
        """Free the memory of all snapshots. Call this when all saved checkpoints are committed. A later `save` takes
        new memory."""
        self._snapshots = None

    def wait_for_commits(self, stop: Callable[[], bool], *, bound: float = STOP_COMMIT_SECONDS) -> None:
        """Wait until every saved checkpoint is committed. All ranks call this together.

        ``stop`` returns whether this rank received SIGTERM. Once any rank has received SIGTERM, the ranks wait at most
        ``bound`` seconds more, and then raise OutsideFailure.
        """
        stop_seen_at: float | None = None
        while True:
            self._uploads.wait(POLL_SECONDS)
            busy, stop_requested, failed = self._gang.sum_over_ranks([self._uploads.busy, stop(), self.failed])
            if failed:
                self.raise_failure()
            if not busy:
                return
            now = self._clock()
            stop_seen_at = now if stop_requested and stop_seen_at is None else stop_seen_at
            if self._gang.any_rank(stop_seen_at is not None and now - stop_seen_at > bound):
                raise OutsideFailure(
                    f"told to stop, but the last checkpoint could not be committed within {bound:.0f} s"
                    + (f": {self._upload_problem}" if self._upload_problem else "")
                )

    def raise_failure(self) -> None:
        """If the background thread of any rank ended with an error, raise the error on all ranks. All ranks call this
        together."""

        def own() -> None:
            if self._uploads.failure is not None:
                raise self._uploads.failure

        self._gang.run_on_all_ranks(own)

    # Functions that the background thread calls

    def _note_upload_problem(self, sentence: str) -> None:
        self._upload_problem = sentence

    def _note_retention_problem(self, sentence: str) -> None:
        self._retention_problem = sentence

    def _upload(self, taken: Snapshot) -> CheckpointRecord:
        """Upload this rank's files, then let rank 0 commit the checkpoint. Return the checkpoint's record, on every
        rank."""
        self._upload_began_at = self._clock()
        background_gang = self._background_gang
        target = checkpoint_folder(self._run, taken.state.step)
        local = self._folder / target
        local.mkdir(parents=True, exist_ok=True)

        files = write_snapshot(taken.tensors, local, rank=background_gang.rank, world_size=background_gang.world_size)
        taken.release()
        if background_gang.is_first:
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

        for _ in range(MAX_UPLOAD_TRIES):
            uploaded = background_gang.gather(upload)
            answer = background_gang.run_on_rank_0(commit)
            if "again" not in answer:
                break
            self._note_upload_problem(answer["again"])
        else:
            raise OutsideFailure(f"{answer['again']}, {MAX_UPLOAD_TRIES} times in a row")
        self._note_upload_problem("")
        record = CheckpointRecord.model_validate(answer)
        self._committed_at = self._clock()
        shutil.rmtree(local, ignore_errors=True)
        if not background_gang.is_first:
            self.lineage = (*self.lineage, record)
        return record

    def _commit(
        self, folder: str, files: list[ManifestFile], state: TrainerState, rows: Sequence[StepRow]
    ) -> CheckpointRecord:
        """Write step log, manifest and COMMIT, then delete the old checkpoints that the job does not keep. Only rank 0
        calls this."""
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
        """Delete the checkpoints that `keepLast` and `keepBest` of the job do not keep.

        The checkpoint from which this run resumed stays too, because a later start falls back to it where this run's
        own checkpoints can't be used.
        """
        keep = to_keep(
            [_id(record) for record in reversed(self.lineage)],
            [_id(record) for record in best_first(self.lineage, self._best_by)],
            keep_last=self._storage.keep_last,
            keep_best=self._storage.keep_best,
            parent=self._parent,
        )
        try:
            apply_retention(self._retention_root, self._run, keep)
        except NewerRun:
            raise
        except OutsideFailure as failure:
            # The failure is only reported, because credentials may permit writing but not deleting. The run then goes
            # on, and the bucket holds more checkpoints than the job asks for.
            self._retention_failure = str(failure)
            return
        finally:
            self._note_retention_problem("")
        self.lineage = tuple(record for record in self.lineage if _id(record) in keep)
        self._other_checkpoints = ()


def _id(record: CheckpointRecord) -> CheckpointId:
    return CheckpointId(record.run, record.step)
