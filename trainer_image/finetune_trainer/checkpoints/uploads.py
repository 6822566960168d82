"""Snapshots on their way to the bucket: a queue between the training thread and one background thread a rank.

The training thread puts and looks, it never waits here but in `wait`. What fails ends the thread's work; the
training thread finds the failure and all ranks leave together.
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
    """One rank's share of the training state after a step, on the CPU."""

    number: int
    """Counts snapshots from 1; the same on every rank."""
    state: TrainerState
    tensors: Mapping[str, torch.Tensor]
    rows: Sequence[StepRow]
    """Rank 0: the steps since the last snapshot."""
    must: bool
    """A best one, or the last step's: a later one does not make up for it."""
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())


class Uploads:
    """The queue and its thread."""

    def __init__(self, upload: Callable[[Snapshot], CheckpointRecord]) -> None:
        """``upload`` commits a snapshot together with the other ranks and returns its record; it may take long."""
        self._upload = upload
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[Snapshot] = []
        self._current: Snapshot | None = None
        self._done: list[CheckpointRecord] = []
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

    @property
    def failure(self) -> Exception | None:
        """What ended the thread's work, None while it goes on."""
        return self._failure

    @property
    def busy(self) -> bool:
        """Whether something is under way or waits, and can still be committed."""
        with self._changed:
            return self._failure is None and (self._current is not None or bool(self._waiting))

    @property
    def current_step(self) -> int | None:
        """The step whose checkpoint is under way."""
        current = self._current
        return current.state.step if current is not None else None

    def put(self, snapshot: Snapshot) -> None:
        """Queue a snapshot."""
        with self._changed:
            self._waiting.append(snapshot)
            self._changed.notify_all()

    def take_done(self) -> list[CheckpointRecord]:
        """Return the records of what was committed since the last call."""
        with self._changed:
            done, self._done = self._done, []
            return done

    def wait(self, seconds: float) -> None:
        """Return once nothing is under way, or after ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy, seconds)

    @contextmanager
    def held(self) -> Iterator[Waiting]:
        """Start nothing new inside the block: what waits may be replaced there."""
        with self._changed:
            yield Waiting(self._waiting, self._current)

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
class Waiting:
    """What waits while it is held."""

    _snapshots: list[Snapshot]
    _current: Snapshot | None

    @property
    def count(self) -> int:
        """How many snapshots wait."""
        return len(self._snapshots)

    @property
    def bytes(self) -> int:
        """Memory that it takes on this rank."""
        return sum(snapshot.bytes for snapshot in self._snapshots)

    @property
    def first(self) -> int:
        """Number of the first snapshot that has not begun; 0 where none waits."""
        return self._snapshots[0].number if self._snapshots else 0

    def drop(self, numbers: Sequence[int]) -> list[StepRow]:
        """Forget snapshots; their steps go to the next that stays. Return those that the newest has to log."""
        rows: list[StepRow] = []
        kept = []
        for item in self._snapshots:
            rows += item.rows
            if item.number not in numbers:
                item.rows, rows = rows, []
                kept.append(item)
        self._snapshots[:] = kept
        return rows

    def replaceable(self, begun: int) -> list[int]:
        """Return the numbers of snapshots above ``begun`` that a newer one makes up for; where all of them are best
        ones, the oldest, which the later ones beat."""
        open_ = [item for item in self._snapshots if item.number > begun]
        return [item.number for item in open_ if not item.must] or [item.number for item in open_[:1]]
