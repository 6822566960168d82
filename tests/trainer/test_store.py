"""The storage protocol against a real MinIO and against a folder of this machine: conditional writes, fencing, verified
folders, retention and retries."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from minio.error import S3Error

from finetune_core.layout import COMMIT, Manifest, checkpoint_folder, parse_uri
from finetune_trainer.pod.errors import Damaged, NewerRun, OutsideFailure
from finetune_trainer.storage.artifact import committed_result, publish
from finetune_trainer.storage.checkpoint_folders import (
    apply_retention,
    committed,
    fetch_folder,
    inventory,
    to_keep,
)
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.commit import commit_folder, upload_files
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.lineage import (
    RECORD_BYTES,
    CheckpointId,
    ParentRecord,
    RunRecord,
    check_fence,
    claim_run_number,
    lineage,
    read_records,
)
from finetune_trainer.storage.root import RunRoot
from tests.trainer.objectstore import BUCKET, ObjectStore, free_port
from tests.trainer.test_recovery import root_of


@pytest.fixture
def objects(empty_store: ObjectStore, request: pytest.FixtureRequest) -> RunRoot:
    """The folder of a job's runs in MinIO."""
    return root_of(empty_store, re.sub("[^a-z0-9]", "-", request.node.name))


@pytest.fixture(params=["objects", "folder"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    """The folder of a job's runs, in MinIO and in a folder of this machine."""
    if request.param == "folder":
        folder = FolderStore.at(tmp_path_factory.mktemp("store"), budget_seconds=5)
        return RunRoot(folder, parse_uri(f"s3://{BUCKET}/runs/default/job/uid-1"))
    found: RunRoot = request.getfixturevalue("objects")
    return found


def record(pod: str, parent: tuple[int, int] | None = None) -> RunRecord:
    return RunRecord(attempt=1, pod_uid=pod, parent=ParentRecord(run=parent[0], step=parent[1]) if parent else None)


def commit(root: RunRoot, run: int, step: int, folder: Path, data: bytes = b"weights") -> str:
    file = folder / "state.safetensors"
    file.write_bytes(data)
    target = checkpoint_folder(run, step)
    files = upload_files(root, target, [file])
    commit_folder(root, target, Manifest(kind="Checkpoint", run=run, step=step, files=files))
    return target


def test_a_second_conditional_put_is_refused_with_412(objects: RunRoot) -> None:
    root = objects
    assert root.create("once", b"first")
    assert not root.create("once", b"second")
    assert root.read("once") == b"first"
    assert isinstance(root.store, Store)
    with pytest.raises(S3Error) as refused:
        root.store._client._execute(
            "PUT", BUCKET, root.location.key("once"), body=b"third", headers={"If-None-Match": "*"}
        )
    assert refused.value.response.status == 412


def test_a_conditional_put_whose_answer_was_lost_counts_as_done(root: RunRoot) -> None:
    assert root.create("once", b"mine")
    assert root.create("once", b"mine")


def test_only_one_of_many_writers_takes_a_run_number(root: RunRoot) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda pod: claim_run_number(root, 1, record(f"pod-{pod}")), range(8)))
    assert sum(taken) == 1


def test_an_older_run_cannot_commit_delete_or_publish(root: RunRoot, tmp_path: Path) -> None:
    claim_run_number(root, 1, record("old"))
    commit(root, 1, 4, tmp_path)
    commit(root, 1, 5, tmp_path)
    claim_run_number(root, 2, record("new", (1, 5)))
    with pytest.raises(NewerRun, match="run 2 of this job has started"):
        check_fence(root, 1)
    with pytest.raises(NewerRun):
        commit(root, 1, 10, tmp_path)
    with pytest.raises(NewerRun):
        apply_retention(root, 1, keep=[])
    with pytest.raises(NewerRun):
        publish(root, 1, 5, [tmp_path / "state.safetensors"])
    assert committed(root) == [(1, 4), (1, 5)]
    assert committed_result(root) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"{}", "is no run record"), (b"\xff", "is no run record"), (b" " * (RECORD_BYTES + 1), "has more than")],
    ids=["malformed", "no text", "long"],
)
def test_a_damaged_run_record_is_named_and_no_fault_of_the_job(content: bytes, problem: str, root: RunRoot) -> None:
    claim_run_number(root, 1, record("old"))
    root.write("runs/000002.json", content)
    with pytest.raises(Damaged, match=f"runs/000002.json .*{problem}"):
        read_records(root)


def test_only_keys_that_a_run_can_write_take_a_run_number(root: RunRoot) -> None:
    """If other keys counted too, every run with a lower number than such a key would end, although no newer run
    exists."""
    for key in ("1", "0000001", "00001", "\N{ARABIC-INDIC DIGIT ONE}" * 6, "9" * 200, "000002.json", "x/000003"):
        root.write(f"runs/{key}.json", b"{}")
    assert read_records(root) == {}
    claim_run_number(root, 1, record("own"))
    claim_run_number(root, 1_000_000, record("later"))
    assert list(read_records(root)) == [1, 1_000_000]


def test_the_first_artifact_wins(root: RunRoot, tmp_path: Path) -> None:
    (tmp_path / "adapter").write_bytes(b"first")
    first = publish(root, 1, 5, [tmp_path / "adapter"])
    (tmp_path / "adapter").write_bytes(b"second")
    assert publish(root, 2, 9, [tmp_path / "adapter"]).artifact == first.artifact
    assert committed_result(root) == first


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda root, at: root.write(f"{at}/state.safetensors", b"Weights"), "its sha256 differs"),
        (lambda root, at: root.write(f"{at}/state.safetensors", b"weight"), "it has 6 bytes"),
        (lambda root, at: root.delete([f"{at}/state.safetensors"]), "state.safetensors is missing"),
        (lambda root, at: root.delete([f"{at}/manifest.json"]), "manifest.json is missing"),
        (lambda root, at: root.write(f"{at}/manifest.json", b"{}"), "manifest.json is not what was committed"),
        (lambda root, at: root.delete([f"{at}/{COMMIT}"]), "COMMIT is missing"),
    ],
    ids=["bit", "truncated", "file gone", "manifest gone", "manifest changed", "not committed"],
)
def test_damage_is_found_and_the_object_is_named(change, problem, root, tmp_path) -> None:  # type: ignore[no-untyped-def]
    at = commit(root, 1, 5, tmp_path)
    fetch_folder(root, at, tmp_path / "whole")
    change(root, at)
    with pytest.raises(Damaged, match=problem):
        fetch_folder(root, at, tmp_path / "damaged")


def test_retention_keeps_last_best_and_parent_and_clears_what_was_never_committed(
    root: RunRoot, tmp_path: Path
) -> None:
    claim_run_number(root, 1, record("old"))
    for step in (1, 2, 3, 4, 5):
        commit(root, 1, step, tmp_path)
    root.write("checkpoints/000001-000000009/state.safetensors", b"never committed")
    claim_run_number(root, 2, record("new", (1, 4)))
    commit(root, 2, 6, tmp_path)
    commit(root, 2, 7, tmp_path)
    line = lineage(read_records(root), committed(root))
    assert line == [(2, 7), (2, 6), (1, 4), (1, 3), (1, 2), (1, 1)]
    keep = to_keep(line, [CheckpointId(1, 2)], keep_last=1, keep_best=1, parent=CheckpointId(1, 4))
    assert apply_retention(root, 2, keep) == [(1, 1), (1, 3), (1, 5), (2, 6)]
    assert committed(root) == [(1, 2), (1, 4), (2, 7)]
    assert not root.list_objects("checkpoints/000001-000000009/")
    assert [(item.run, item.step) for item in inventory(root)] == [(1, 2), (1, 4), (2, 7)]


@pytest.mark.parametrize(
    ("parents", "stored", "expected"),
    [
        ({}, [], []),
        ({1: None}, [(1, 5), (1, 10)], [(1, 10), (1, 5)]),
        # Run 2 resumed from step 5 and has not committed a checkpoint yet, so step 10 belongs to an abandoned branch.
        ({1: None, 2: (1, 5)}, [(1, 5), (1, 10)], [(1, 5)]),
        ({1: None, 2: (1, 5)}, [(1, 5), (1, 10), (2, 8)], [(2, 8), (1, 5)]),
        # The parent of run 3, step 12 of run 2, was deleted. Step 20 of run 2 is later than the parent, so the next
        # checkpoint of the lineage is step 5 of run 1.
        ({1: None, 2: (1, 10), 3: (2, 12)}, [(1, 5), (2, 20)], [(1, 5)]),
        # A run that started from the base model abandons all earlier checkpoints.
        ({1: None, 2: None}, [(1, 5)], []),
        # A record that names its own run as the parent ends the chain of runs.
        ({1: None, 2: (2, 5)}, [(1, 5), (2, 5)], [(2, 5)]),
    ],
)
def test_lineage_follows_the_records_and_never_the_highest_step(
    parents: dict[int, tuple[int, int] | None],
    stored: list[tuple[int, int]],
    expected: list[tuple[int, int]],
) -> None:
    records = {run: record("pod", parent) for run, parent in parents.items()}
    assert lineage(records, [CheckpointId(*item) for item in stored]) == expected


def test_a_request_is_retried_with_growing_delays_until_the_budget_is_spent(empty_store: ObjectStore) -> None:
    delays: list[float] = []
    store = Store(
        f"http://127.0.0.1:{free_port()}",
        "us-east-1",
        empty_store.credentials,
        budget_seconds=3,
        wait=delays.append,
    )
    with pytest.raises(OutsideFailure, match=r"storage.endpoint: .* can't be reached \(.*Connection refused\)"):
        store.with_budget(0.6).read(BUCKET, "key")
    assert delays[0] == 0.5
    assert delays == sorted(delays)
