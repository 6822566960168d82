"""The queue of snapshots (copies of the training state in memory) that wait for their upload. Each rank has one queue:
the rank's training thread adds snapshots, and a background thread uploads them.

`saver.py` uses the queue. The training thread never waits for an upload, except in `wait`. When an upload fails, the
background thread ends. The training thread then finds the error in `failure`, and all ranks end together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from finetune_core.contract import CheckpointRecord
from finetune_trainer.storage.checkpoint_folders import TrainerState
from finetune_trainer.storage.step_log import StepRow


@dataclass
class Snapshot:
    """The part of the training state that one rank stores after a step, copied to CPU memory."""

    number: int
    """Number of the snapshot within the run, from 1. A snapshot has the same number on every rank."""
    state: TrainerState
    """The training state that is not a tensor, such as step, seed and validation perplexity."""
    tensors: Mapping[str, torch.Tensor]
    """fp32 tensors by `<parameter>/<kind>`, where the kind names the value or one of AdamW's two moments, for example
    `model.norm.weight/exp_avg`."""
    rows: Sequence[StepRow]
    """Rows of the step log since the snapshot before this one. The rows of a dropped snapshot are added to the next one
    that stays. Empty on all ranks but rank 0."""
    best: bool
    """Whether the evaluation after this step is the best so far. Where too many snapshots wait, the other snapshots are
    dropped first."""
    free_memory: Callable[[], None] | None = None
    """Function that lets a later snapshot use the memory of `tensors`. None where the memory is freed by itself."""
    bytes: int = field(init=False)
    """Size of `tensors` in bytes."""

    def __post_init__(self) -> None:
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def release(self) -> None:
        """Let a later snapshot use the memory of the tensors, which nobody may read afterwards."""
        self.tensors = {}
        if self.free_memory is not None:
            # The function refers to the memory, so it is not kept.
            free_memory, self.free_memory = self.free_memory, None
            free_memory()


class UploadQueue:
    """Uploads snapshots one after the other, in a background thread."""

    def __init__(self, upload: Callable[[Snapshot], CheckpointRecord]) -> None:
        """Start the background thread. ``upload`` commits a snapshot together with the other ranks, and returns the
        checkpoint's record. The call may take minutes."""
        self._upload = upload
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[Snapshot] = []
        self._current: Snapshot | None = None
        self._done: list[CheckpointRecord] = []
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

    @property
    def failure(self) -> Exception | None:
        """The error that ended the background thread, None while the thread works."""
        return self._failure

    @property
    def busy(self) -> bool:
        """Return whether a snapshot is being uploaded or waits, and the background thread still works."""
        with self._changed:
            return self._failure is None and (self._current is not None or bool(self._waiting))

    @property
    def current_step(self) -> int | None:
        """The step of the snapshot that is being uploaded. None where no upload is under way."""
        current = self._current
        return current.state.step if current is not None else None

    def put(self, snapshot: Snapshot) -> None:
        """Add a snapshot at the end of the queue."""
        with self._changed:
            self._waiting.append(snapshot)
            self._changed.notify_all()

    def take_done(self) -> list[CheckpointRecord]:
        """Return the records of the checkpoints that were committed since the last call."""
        with self._changed:
            done, self._done = self._done, []
            return done

    def wait(self, seconds: float) -> None:
        """Wait until the queue is no longer busy, or until ``seconds`` have passed."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy, seconds)

    @contextmanager
    def hold(self) -> Iterator[WaitingSnapshots]:
        """Keep the background thread from starting an upload while the block runs. The block receives the waiting
        snapshots, and may drop some of them."""
        with self._changed:
            yield WaitingSnapshots(self._waiting, self._current)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                self._current = self._waiting.pop(0)
                snapshot = self._current
            try:
                record = self._upload(snapshot)
            except Exception as error:  # noqa: BLE001  (raised by the training thread, on all ranks)
                with self._changed:
                    self._failure, self._current = error, None
                    self._changed.notify_all()
                return
            with self._changed:
                self._current = None
                self._done.append(record)
                self._changed.notify_all()


@dataclass
class WaitingSnapshots:
    """The snapshots that wait for their upload. Use this only inside of `UploadQueue.hold`, which keeps the background
    thread from taking a snapshot."""

    _snapshots: list[Snapshot]
    _current: Snapshot | None

    @property
    def count(self) -> int:
        """How many snapshots wait."""
        return len(self._snapshots)

    @property
    def bytes(self) -> int:
        """Memory of the waiting snapshots on this rank, in bytes."""
        return sum(snapshot.bytes for snapshot in self._snapshots)

    @property
    def first(self) -> int:
        """Number of the first waiting snapshot; 0 where none waits."""
        return self._snapshots[0].number if self._snapshots else 0

    def drop(self, numbers: Sequence[int]) -> list[StepRow]:
        """Remove the snapshots with these ``numbers``, and let later snapshots use their memory.

        The step-log rows of a removed snapshot are added to the next snapshot that stays. Return the rows for which no
        later snapshot is left, so that the caller can add them to a new snapshot.
        """
        rows: list[StepRow] = []
        kept = []
        for item in self._snapshots:
            rows += item.rows
            if item.number in numbers:
                item.release()
            else:
                item.rows, rows = rows, []
                kept.append(item)
        self._snapshots[:] = kept
        return rows

    def replaceable(self, begun: int, *, best: bool) -> list[int]:
        """Return the numbers of the waiting snapshots that may be dropped in favour of a newer snapshot. ``best`` tells
        whether the newer snapshot is the best so far. Snapshots up to number ``begun`` are not among them, because some
        rank has begun to upload them.

        The snapshots that were not the best when they were taken may be dropped. Where there is no such snapshot, only
        the oldest one may be dropped, because each later snapshot was the best so far when it was taken. The best
        snapshot of all is never dropped, because the artifact may have to be made of it.
        """
        open_ = [item for item in self._snapshots if item.number > begun]
        others = [item.number for item in open_ if not item.best]
        worse = open_ if best else open_[:-1]
        return others or [item.number for item in worse[:1]]
