"""The queue of snapshots that wait for their upload, and the rule that says after which steps a checkpoint is saved.

Newer snapshots replace some of the waiting snapshots, and no row of the step log is lost. Neither store nor ranks are
needed, because only the order of events matters.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from functools import partial

import pytest
import torch

from finetune_core.contract import CheckpointRecord, StorageConfig
from finetune_trainer.checkpoints.saver import is_due
from finetune_trainer.checkpoints.uploads import Snapshot, UploadQueue
from finetune_trainer.storage.checkpoint_folders import TrainerState
from finetune_trainer.storage.step_log import StepRow

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def snapshot(number: int, *, best: bool = False) -> Snapshot:
    state = TrainerState(
        step=number, epoch=0, batch_in_epoch=0, seed=1, updates=number, tokens=1, world_size=1, zero_stage=0, rows=1
    )
    row = StepRow(step=number, epoch=0, loss=1.0, learning_rate=1.0, gradient_norm=1.0, tokens=1, seconds=1.0)
    return Snapshot(number, state, {"weight/master": torch.zeros(256)}, [row], best)


class Store:
    """A callable in place of the upload and commit of a snapshot.

    A call waits until the test allows the commit, and then records the snapshot in `committed`, or raises `failure`.
    """

    def __init__(self) -> None:
        self.committed: list[Snapshot] = []
        self.begun = threading.Semaphore(0)
        self.let = threading.Semaphore(0)
        self.failure: Exception | None = None

    def __call__(self, taken: Snapshot) -> CheckpointRecord:
        self.begun.release()
        assert self.let.acquire(timeout=20)
        if self.failure is not None:
            raise self.failure
        self.committed.append(taken)
        return CheckpointRecord(run=1, step=taken.state.step, uri="s3://b/c", bytes=1, manifest_sha256="a", time=NOW)


@pytest.fixture
def store() -> Store:
    return Store()


def test_what_waits_is_replaced_but_not_the_best_and_no_step_is_lost(store: Store) -> None:
    uploads = UploadQueue(store)
    uploads.put(snapshot(1))
    assert store.begun.acquire(timeout=20)
    for taken in (snapshot(2), snapshot(3, best=True), snapshot(4)):
        uploads.put(taken)
    with uploads.hold() as waiting:
        assert (waiting.count, waiting.first, waiting.bytes) == (3, 2, 3 * 1024)
        # Another rank has begun to upload snapshot 2, so this rank must upload snapshot 2 too and may not replace it.
        assert waiting.replaceable(2, best=False) == [4]
        assert waiting.replaceable(1, best=False) == [2, 4]
        rows = waiting.drop([2, 4])
    assert [row.step for row in rows] == [4]
    store.let.release(2)
    uploads.wait(20)
    assert [taken.number for taken in store.committed] == [1, 3]
    assert [[row.step for row in taken.rows] for taken in store.committed] == [[1], [2, 3]]
    assert [record.step for record in uploads.take_done()] == [1, 3]
    assert uploads.take_done() == []
    assert not uploads.busy


def test_the_memory_of_a_dropped_snapshot_can_be_used_again(store: Store) -> None:
    freed: list[int] = []
    uploads = UploadQueue(store)
    for number in (1, 2, 3):
        taken = snapshot(number)
        taken.free_memory = partial(freed.append, number)
        uploads.put(taken)
    assert store.begun.acquire(timeout=20)
    with uploads.hold() as waiting:
        waiting.drop([2])
        assert freed == [2]
        assert waiting.bytes == 1024
    store.let.release(2)
    uploads.wait(20)
    assert freed == [2], "the upload itself frees the memory, once the files are written"


def test_of_best_ones_the_oldest_goes_because_the_later_ones_beat_it(store: Store) -> None:
    uploads = UploadQueue(store)
    for number in (1, 2, 3):
        uploads.put(snapshot(number, best=True))
    assert store.begun.acquire(timeout=20)
    with uploads.hold() as waiting:
        assert waiting.replaceable(1, best=True) == [2]
        assert waiting.replaceable(3, best=True) == []
    store.let.release(3)
    uploads.wait(20)


def test_the_best_one_waits_on_when_one_that_is_not_better_comes(store: Store) -> None:
    uploads = UploadQueue(store)
    for number in (1, 2, 3):
        uploads.put(snapshot(number, best=True))
    assert store.begun.acquire(timeout=20)
    with uploads.hold() as waiting:
        assert waiting.replaceable(1, best=False) == [2], "snapshot 3 is better"
        assert waiting.replaceable(2, best=False) == [], "the artifact may have to be made of snapshot 3"
        assert waiting.replaceable(2, best=True) == [3]
    store.let.release(3)
    uploads.wait(20)


def test_a_failure_ends_the_thread_and_is_kept(store: Store) -> None:
    uploads = UploadQueue(store)
    store.failure = RuntimeError("the store is gone")
    uploads.put(snapshot(1))
    uploads.put(snapshot(2))
    store.let.release()
    uploads.wait(20)
    assert uploads.failure is store.failure
    assert not uploads.busy, "nobody may wait for what will never be committed"
    assert uploads.take_done() == []


@pytest.mark.parametrize(
    ("every", "step", "elapsed", "due"),
    [
        ({"checkpoint_every_steps": 5}, 10, 0.0, True),
        ({"checkpoint_every_steps": 5}, 11, 1e6, False),
        ({"checkpoint_every_minutes": 2}, 11, 119.0, False),
        ({"checkpoint_every_minutes": 2}, 11, 120.0, True),
        ({}, 10, 1e6, False),
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_minutes(
    every: dict[str, int], step: int, elapsed: float, due: bool
) -> None:
    storage = StorageConfig(uri="s3://b/r", endpoint="http://h", region="r", keep_last=2, **every)
    assert is_due(storage, step, elapsed) is due
