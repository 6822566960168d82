"""A starting run resumes from the right checkpoint, whatever happened to the bucket before.

The tests that read or write a bucket use a real object store.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_core.contract import Identity
from finetune_core.errors import UserError
from finetune_core.layout import COMMIT, MANIFEST, TRAINER_FILE, Manifest, ManifestFile, checkpoint_folder, digest
from finetune_trainer.checkpoints.resume import RunStart, start_run, start_run_after_rollback
from finetune_trainer.model.digest import BaseDigests
from finetune_trainer.pod.errors import NewerRun
from finetune_trainer.storage.artifact import committed_result, publish
from finetune_trainer.storage.checkpoint_folders import (
    TrainerState,
    apply_retention,
    committed,
    fetch_folder,
    to_keep,
)
from finetune_trainer.storage.commit import commit_folder, upload_files
from finetune_trainer.storage.lineage import CheckpointId, Rollback, lineage, read_records
from finetune_trainer.storage.root import RunRoot
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.test_recovery import root_of

OBJECTS = ("state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", TRAINER_FILE, MANIFEST, COMMIT)


@pytest.fixture
def root(empty_store: ObjectStore, request: pytest.FixtureRequest, tmp_path: Path) -> RunRoot:
    return root_of(empty_store, f"start-{tmp_path.name}")


def identity(pod: str = "pod-1", attempt: int = 1) -> Identity:
    return Identity(namespace="default", name="job", uid="u", attempt=attempt, pod_name="p", pod_uid=pod, node_rank=0)


def begin(root: RunRoot, folder: Path, pod: str = "pod-1") -> RunStart:
    return start_run(root, identity(pod), folder / "resume")


def commit(root: RunRoot, run: int, step: int, folder: Path, *, perplexity: float | None = None) -> None:
    """Commit a checkpoint with the trainer's state and two small state shards, as the ranks of run ``run`` do."""
    state = TrainerState(
        step=step, epoch=0, batch_in_epoch=step, seed=1, updates=step, tokens=step, world_size=2, zero_stage=2,
        rows=20, perplexity=perplexity,
    )  # fmt: skip
    (folder / TRAINER_FILE).write_text(state.to_json())
    for shard in range(2):
        tensors = {f"layer.{shard}/master": np.full(256, step, dtype=np.float32)}
        save_file(tensors, folder / f"state-{shard:05d}-of-00002.safetensors")
    target = checkpoint_folder(run, step)
    files = upload_files(root, target, sorted([folder / TRAINER_FILE, *folder.glob("state-*.safetensors")]))
    commit_folder(root, target, Manifest(kind="Checkpoint", run=run, step=step, files=files))


def spoil(root: RunRoot, key: str, how: str) -> None:
    """Damage an object as a failing disk does: ``how`` is flip (one bit), truncate or delete."""
    data = bytearray(root.read(key) or b"")
    if how == "delete":
        root.delete([key])
        return
    if how == "flip":
        data[len(data) // 2] ^= 1
    root.write(key, bytes(data[: len(data) // 2] if how == "truncate" else data))


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", OBJECTS)
def test_trap_16_damage_to_any_object_of_the_newest_falls_back_and_names_the_object(
    root: RunRoot, tmp_path: Path, name: str, how: str
) -> None:
    assert begin(root, tmp_path).run == 1
    commit(root, 1, 5, tmp_path)
    commit(root, 1, 10, tmp_path)
    key = f"{checkpoint_folder(1, 10)}/{name}"
    spoil(root, key, how)
    start = begin(root, tmp_path, "pod-2")
    assert start.parent is not None
    assert (start.parent.run, start.parent.step) == (1, 5)
    (told,) = start.notices
    assert key in told
    assert [record.step for record in start.ancestors] == [5]
    fetched = TrainerState.model_validate_json((tmp_path / "resume" / TRAINER_FILE).read_text())
    assert fetched.step == 5
    if (name, how) != (COMMIT, "delete"):
        (damaged,) = start.other_checkpoints
        assert damaged.step == 10
        assert name in damaged.damaged


def test_where_nothing_is_whole_training_starts_from_the_base_model(root: RunRoot, tmp_path: Path) -> None:
    begin(root, tmp_path)
    commit(root, 1, 5, tmp_path)
    spoil(root, f"{checkpoint_folder(1, 5)}/{TRAINER_FILE}", "flip")
    start = begin(root, tmp_path)
    assert start.parent is None
    assert start.notices[-1] == "no checkpoint could be used: training starts from the base model"


class Evil:
    """Creates the file ``trace`` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("place", "problem"),
    [(None, ""), (OBJECTS[0], "deserializing header: header too large)"), (TRAINER_FILE, "state of this version")],
    ids=["beside", "as tensors", "as state"],
)
def test_a_malicious_pickle_among_the_files_is_never_opened(
    root: RunRoot, tmp_path: Path, place: str | None, problem: str
) -> None:
    """Somebody with write access to the bucket commits a checkpoint that verifies and contains pickle files. The
    trainer never unpickles such files."""
    trace = tmp_path / "unpickled"
    evil = pickle.dumps(Evil(trace))
    pickle.loads(evil)  # noqa: S301  (the trap works)
    assert trace.exists()
    trace.unlink()
    begin(root, tmp_path)
    commit(root, 1, 5, tmp_path)
    commit(root, 1, 10, tmp_path)
    folder = checkpoint_folder(1, 10)
    manifest = Manifest.model_validate_json(root.read(f"{folder}/{MANIFEST}") or b"")

    def recommit(*names: str) -> None:
        for name in names:
            if ".." not in name:
                root.write(f"{folder}/{name}", evil)
        added = [ManifestFile(name=name, bytes=len(evil), sha256=digest(evil)) for name in names]
        kept = [file for file in manifest.files if file.name not in names]
        data = manifest.model_copy(update={"files": [*kept, *added]}).encode()
        root.write(f"{folder}/{MANIFEST}", data)
        root.write(f"{folder}/{COMMIT}", digest(data).encode())

    if place is None:
        recommit("pytorch_model.bin", "optimizer.pt", "mp_rank_00_model_states.pt", "rng.pkl", "../../outside.json")
    else:
        recommit(place)
    start = begin(root, tmp_path)
    assert start.parent is not None
    assert start.parent.step == (10 if place is None else 5)
    # Files in the manifest with other names than the trainer's own files are not downloaded.
    fetched = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert fetched == sorted([TRAINER_FILE, OBJECTS[0], OBJECTS[1]])
    assert "".join(start.notices).endswith(problem)
    assert not trace.exists()


def test_a_crash_right_after_a_rollback_does_not_resume_into_the_branch_that_diverged(
    root: RunRoot, tmp_path: Path
) -> None:
    begin(root, tmp_path)
    for step in (5, 10, 15):
        commit(root, 1, step, tmp_path)
    rollback = Rollback(step=5, rate_factor=0.3, skip_from=6, skip_to=16, reason="the loss exploded at step 16")
    second = start_run_after_rollback(root, identity(), 1, rollback, tmp_path / "resume")
    assert (second.run, second.parent and second.parent.step) == (2, 5)
    # The process of run 2 ends here, before its first checkpoint, and run 3 begins.
    third = begin(root, tmp_path, "pod-2")
    assert third.run == 3
    assert third.parent is not None
    assert (third.parent.run, third.parent.step) == (1, 5)
    assert third.rollbacks == second.rollbacks == [rollback]
    commit(root, 3, 8, tmp_path)
    apply_retention(root, 3, to_keep([CheckpointId(3, 8)], [], keep_last=2, keep_best=1, parent=CheckpointId(1, 5)))
    assert committed(root) == [(1, 5), (3, 8)]
    assert lineage(read_records(root), committed(root)) == [(3, 8), (1, 5)]


def test_a_run_that_was_fenced_can_not_roll_back(root: RunRoot, tmp_path: Path) -> None:
    begin(root, tmp_path)
    commit(root, 1, 5, tmp_path)
    begin(root, tmp_path, "pod-2")
    rollback = Rollback(step=5, rate_factor=0.3, skip_from=6, skip_to=7, reason="")
    with pytest.raises(NewerRun, match="run 1 ended"):
        start_run_after_rollback(root, identity(), 1, rollback, tmp_path / "resume")


def test_a_frozen_attempt_that_thaws_at_any_point_harms_nothing(root: RunRoot, tmp_path: Path) -> None:
    """Run 1 freezes right before one of its writes, and continues after run 2 has finished.

    Meanwhile run 2 resumes, commits checkpoints and publishes its artifact. The test tries the writes of run 1 one
    after another.
    """
    begin(root, tmp_path)
    for step in (5, 10):
        commit(root, 1, step, tmp_path)
    second = begin(root, tmp_path, "pod-2")
    assert second.parent is not None
    commit(root, 2, 12, tmp_path)
    commit(root, 2, 14, tmp_path)
    (tmp_path / "adapter").write_bytes(b"second")
    result = publish(root, 2, 14, [tmp_path / "adapter"])
    before = {entry.key for entry in root.list_objects("")}

    # Run 1 can still upload files, which do not count without COMMIT. Run 1 can also write one COMMIT, if it froze
    # between its check that no later run has started (the fence) and this COMMIT. The checkpoint then belongs to an
    # abandoned branch, from which no later run resumes.
    frozen = checkpoint_folder(1, 15)
    root.write(f"{frozen}/{MANIFEST}", b"{}")
    assert root.create(f"{frozen}/{COMMIT}", digest(b"{}").encode())
    # Before any other commit, before deleting by retention and before publishing, run 1 checks the fence again.
    (tmp_path / "adapter").write_bytes(b"first")
    for write in (
        lambda: commit(root, 1, 20, tmp_path),
        lambda: apply_retention(root, 1, keep=[]),
        lambda: publish(root, 1, 20, [tmp_path / "adapter"]),
    ):
        with pytest.raises(NewerRun):
            write()
    assert committed_result(root) == result
    assert before <= {entry.key for entry in root.list_objects("")}
    assert lineage(read_records(root), committed(root))[:2] == [(2, 14), (2, 12)]
    third = begin(root, tmp_path, "pod-3")
    assert third.parent is not None
    assert (third.parent.run, third.parent.step) == (2, 14)


@pytest.mark.parametrize("point", range(1, 7))
def test_trap_18_a_crash_in_the_middle_of_retention_leaves_nothing_that_looks_whole_and_is_cleared(
    root: RunRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Retention deletes three checkpoints, each with two deletions: first COMMIT, then all other files.

    In each case the process is killed during one of the six deletions, when half of the deletion's files (rounded down)
    are gone.
    """
    begin(root, tmp_path)
    for step in (1, 2, 3, 4):
        commit(root, 1, step, tmp_path)
    keep = [CheckpointId(1, 4)]
    real, calls = root.store.delete, []

    class KilledError(Exception):
        """Is raised in place of the end of the killed process."""

    def delete(bucket: str, keys: list[str]) -> None:
        calls.append(keys)
        if len(calls) == point:
            real(bucket, keys[: len(keys) // 2])
            raise KilledError
        real(bucket, keys)

    monkeypatch.setattr(root.store, "delete", delete)
    with pytest.raises(KilledError):
        apply_retention(root, 1, keep)
    monkeypatch.undo()
    left = [(1, step) for step in (1, 2, 3, 4) if step == 4 or step > point // 2]
    assert committed(root) == left, "COMMIT went first"
    halves = {entry.key.rpartition("/")[2] for entry in root.list_objects(f"{checkpoint_folder(1, (point + 1) // 2)}/")}
    assert halves
    assert (COMMIT in halves) is (point % 2 == 1)
    for checkpoint in left:
        fetch_folder(root, checkpoint_folder(*checkpoint), tmp_path / f"whole-{checkpoint[1]}")
    commit(root, 1, 5, tmp_path)
    apply_retention(root, 1, [CheckpointId(1, 5)])
    assert {key.split("/")[1] for key in (entry.key for entry in root.list_objects("checkpoints/"))} == {
        "000001-000000005"
    }


def test_a_start_that_reads_while_the_former_run_retains_ends_with_a_whole_checkpoint_of_the_lineage(
    root: RunRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the new run reads a checkpoint, the former run is still alive and deletes this checkpoint.

    Once the new run has claimed its run number, the former run may not delete any more.
    """
    begin(root, tmp_path)
    commit(root, 1, 5, tmp_path)
    real, reads = root.store.download, []

    def download(bucket: str, key: str, path: Path) -> object:
        reads.append(key)
        if len(reads) == 2:
            commit(root, 1, 10, tmp_path)
            assert apply_retention(root, 1, [CheckpointId(1, 10)]) == [(1, 5)]
        return real(bucket, key, path)

    monkeypatch.setattr(root.store, "download", download)
    start = begin(root, tmp_path, "pod-2")
    monkeypatch.undo()
    assert any("000000005" in key for key in reads)
    assert start.parent is not None
    assert (start.parent.run, start.parent.step) == (1, 10)
    assert TrainerState.model_validate_json((tmp_path / "resume" / TRAINER_FILE).read_text()).step == 10
    assert lineage(read_records(root), committed(root)) == [(1, 10)]
    with pytest.raises(NewerRun):
        commit(root, 1, 15, tmp_path)
    assert apply_retention(root, 1, []) == []
    assert committed(root) == [(1, 10)]


def test_trap_18_retention_keeps_the_best_of_the_lineage_and_what_is_on_its_way(root: RunRoot, tmp_path: Path) -> None:
    begin(root, tmp_path)
    for step, perplexity in ((1, 9.0), (2, 3.0), (3, 2.0), (4, 5.0), (5, 6.0)):
        commit(root, 1, step, tmp_path, perplexity=perplexity)
    root.write(f"{checkpoint_folder(1, 6)}/state-00000-of-00002.safetensors", b"under way")
    newest_first = [CheckpointId(1, step) for step in (5, 4, 3, 2, 1)]
    best_first = [CheckpointId(1, step) for step in (3, 2, 4, 5, 1)]
    apply_retention(root, 1, to_keep(newest_first, best_first, keep_last=1, keep_best=2, parent=None))
    assert committed(root) == [(1, 2), (1, 3), (1, 5)]
    assert root.read(f"{checkpoint_folder(1, 6)}/state-00000-of-00002.safetensors") == b"under way"


def test_the_bucket_holds_what_the_listing_says(root: RunRoot, empty_store: ObjectStore, tmp_path: Path) -> None:
    """The other tests read the bucket with the trainer's own client; this test uses the client of MinIO."""
    begin(root, tmp_path)
    commit(root, 1, 5, tmp_path)
    keys = empty_store.keys(f"{root.location.prefix}/")
    assert sorted(key.removeprefix(f"{root.location.prefix}/") for key in keys) == sorted(
        [*(f"{checkpoint_folder(1, 5)}/{name}" for name in OBJECTS), "runs/000001.json"]
    )
    stored = empty_store.client.stat_object(BUCKET, f"{root.location.prefix}/{checkpoint_folder(1, 5)}/{OBJECTS[0]}")
    assert stored.metadata["x-amz-meta-sha256"] == digest((tmp_path / OBJECTS[0]).read_bytes())


def test_adapters_are_resumed_on_their_own_base_and_seed_only(tmp_path: Path) -> None:
    base, extended = tmp_path / "base", tmp_path / "extended"
    for folder, value in ((base, 1), (extended, 2)):
        folder.mkdir()
        save_file({"weight": np.full(8, value, dtype=np.float32)}, folder / "model.safetensors")
    plain, with_rows = (BaseDigests.of(adapters=True, base=base, extended=where) for where in (base, extended))
    assert plain.rows_sha256 is None
    assert with_rows.rows_sha256 not in (None, with_rows.base_sha256)
    assert BaseDigests.of(adapters=False, base=base, extended=base) == BaseDigests()
    state = TrainerState(
        step=5, epoch=0, batch_in_epoch=0, seed=1, updates=5, tokens=5, world_size=1, zero_stage=0, rows=20,
        base_sha256=with_rows.base_sha256, rows_sha256=with_rows.rows_sha256,
    )  # fmt: skip
    with_rows.check(state, seed=1)
    with pytest.raises(UserError, match=r"training\.seed: is 2, but the checkpoint of step 5 was trained with 1"):
        with_rows.check(state, seed=2)
    save_file({"weight": np.full(8, 3, dtype=np.float32)}, extended / "model.safetensors")
    with pytest.raises(UserError, match=r"model: is not what the checkpoint of step 5 .* rows of the added tokens"):
        BaseDigests.of(adapters=True, base=base, extended=extended).check(state, seed=1)
    (base / "model.safetensors").rename(base / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "other.safetensors"}}))
    with pytest.raises(UserError, match=r"the base model's weights is .*, not .*; name that revision again"):
        BaseDigests.of(adapters=True, base=base, extended=extended).check(state, seed=1)
