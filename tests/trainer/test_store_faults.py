"""Whatever happens to a request, each COMMIT in the bucket belongs to a checkpoint that verifies.

Temporary failures are retried.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_core.layout import COMMIT, MANIFEST, Manifest, checkpoint_folder, parse_uri
from finetune_trainer.pod.errors import Damaged, OutsideFailure
from finetune_trainer.pod.settings import BACKGROUND_BUDGET_SECONDS
from finetune_trainer.storage.checkpoint_folders import apply_retention, committed, fetch_folder
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.commit import commit_folder, upload_files
from finetune_trainer.storage.lineage import RunRecord, claim_run_number
from finetune_trainer.storage.retries import LONGEST_DELAY_SECONDS
from finetune_trainer.storage.root import RunRoot
from tests.trainer.objectstore import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    ObjectStore,
    write_credentials,
)
from tests.trainer.smallstore import FULL, fill, make_room, small_store
from tests.trainer.storeproxy import Fault, Request, StoreProxy, proxy_before

SEED = {"state-00000-of-00002.safetensors": b"zero" * 20_000, "state-00001-of-00002.safetensors": b"one" * 20_000}


@pytest.fixture(scope="module")
def proxy(empty_store: ObjectStore) -> Iterator[StoreProxy]:
    with proxy_before(empty_store.endpoint) as running:
        yield running


@pytest.fixture
def healthy(proxy: StoreProxy) -> Iterator[StoreProxy]:
    yield proxy
    proxy.plan, proxy.down, proxy.bytes_per_second = (lambda request: None), False, None
    proxy.released.clear()


def root_at(endpoint: str, credentials: Path, name: str, *, budget: float = 20, **options: Any) -> RunRoot:
    """Return the run folder ``name`` in the store at ``endpoint``, with a client that retries without a pause."""
    store = Store(
        endpoint, "us-east-1", credentials, budget_seconds=budget, read_seconds=2, wait=lambda delay: None, **options
    )
    return RunRoot(store, parse_uri(f"s3://{BUCKET}/faults/{name}"))


def fault_at(index: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Return a plan for the proxy that injects ``fault`` into the request with the number ``index`` only."""
    return lambda request: fault if request.index == index else None


def fault_from(index: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Return a plan for the proxy that injects ``fault`` into request number ``index`` and all later requests."""
    return lambda request: fault if request.index >= index else None


def write_files(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, data in SEED.items():
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())


def commit_checkpoint(root: RunRoot, files: list[Path], step: int) -> None:
    """Upload and commit a checkpoint, and delete older ones, as the background threads of a run do, but in one
    thread."""
    target = checkpoint_folder(1, step)
    for last_try in (False, False, True):
        uploaded = upload_files(root, target, files)
        try:
            commit_folder(root, target, Manifest(kind="Checkpoint", run=1, step=step, files=uploaded))
            break
        except Damaged:
            if last_try:
                raise
    apply_retention(root, 1, keep=[])


def fails(root: RunRoot, files: list[Path], step: int) -> bool:
    """Try to commit a checkpoint, and return whether that failed."""
    try:
        commit_checkpoint(root, files, step)
    except OutsideFailure:
        return True
    return False


def assert_every_commit_verifies(store: ObjectStore, prefix: str) -> int:
    """Verify every committed folder, and return the number of COMMIT objects.

    The bucket is read directly, without the proxy and without the trainer's code.
    """
    commits = [key for key in store.keys(prefix) if key.endswith(f"/{COMMIT}")]
    for key in commits:
        folder = key.removesuffix(f"/{COMMIT}")
        encoded = store.read(f"{folder}/{MANIFEST}")
        assert hashlib.sha256(encoded).hexdigest() == store.read(key).decode()
        for file in json.loads(encoded)["files"]:
            assert hashlib.sha256(store.read(f"{folder}/{file['name']}")).hexdigest() == file["sha256"], file
    return len(commits)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.HANG, Fault.DENIED)])
def test_trap_17_a_fault_on_any_request_leaves_no_commit_that_does_not_verify(
    fault: Fault, healthy: StoreProxy, empty_store: ObjectStore, tmp_path: Path
) -> None:
    files = write_files(tmp_path / "files")
    name = fault.name.lower()
    root = root_at(healthy.endpoint, empty_store.credentials, name)
    claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod"))
    first = len(healthy.requests)
    commit_checkpoint(root, files, 1)
    count = len(healthy.requests) - first
    assert count >= 8
    for index in range(count + 2):
        first = len(healthy.requests)
        healthy.plan = fault_at(first + index, fault)
        commit_checkpoint(root, files, index + 2)
        assert assert_every_commit_verifies(empty_store, f"faults/{name}/") >= 1
    assert committed(root)[-1].step == count + 3, "one fault is passed by trying again"
    fetch_folder(root, checkpoint_folder(1, count + 3), tmp_path / "fetched")


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.RESET_AFTER, Fault.FLIP_UPLOAD])
def test_a_store_that_stays_broken_from_any_request_on_commits_nothing_false(
    fault: Fault, healthy: StoreProxy, empty_store: ObjectStore, tmp_path: Path
) -> None:
    files, name = write_files(tmp_path / "files"), f"stays-{fault.name.lower()}"
    root = root_at(healthy.endpoint, empty_store.credentials, name, budget=0)
    claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod"))
    failures = 0
    for index in range(9):
        first = len(healthy.requests)
        healthy.plan = fault_from(first + index, fault)
        failures += fails(root, files, index + 1)
        assert_every_commit_verifies(empty_store, f"faults/{name}/")
    # FLIP_UPLOAD makes fewer commits fail, because it only affects requests with a body.
    assert failures >= (4 if fault is Fault.FLIP_UPLOAD else 9)


def test_a_hang_ends_with_the_reading_time_and_is_tried_again(
    healthy: StoreProxy, empty_store: ObjectStore, tmp_path: Path
) -> None:
    root = root_at(healthy.endpoint, empty_store.credentials, "hang")
    first = len(healthy.requests)
    healthy.plan = lambda request: Fault.HANG if request.index == first else None
    began = time.monotonic()
    root.write("object", b"data")
    assert 2 <= time.monotonic() - began < 20
    assert root.read("object") == b"data"


def test_wrong_bytes_on_the_way_back_are_fetched_again_before_they_count_as_damage(
    healthy: StoreProxy, empty_store: ObjectStore, tmp_path: Path
) -> None:
    root = root_at(healthy.endpoint, empty_store.credentials, "flipped")
    claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod"))
    commit_checkpoint(root, write_files(tmp_path / "files"), 1)
    seen: list[Request] = []

    def once(request: Request) -> Fault | None:
        if request.method == "GET" and "state-00001" in request.path:
            seen.append(request)
            return Fault.FLIP_DOWNLOAD if len(seen) == 1 else None
        return None

    healthy.plan = once
    fetch_folder(root, checkpoint_folder(1, 1), tmp_path / "fetched")
    assert len(seen) == 2
    healthy.plan = lambda request: Fault.FLIP_DOWNLOAD if "state-00001" in request.path else None
    with pytest.raises(Damaged, match=r"state-00001-of-00002\.safetensors is not what was committed"):
        fetch_folder(root, checkpoint_folder(1, 1), tmp_path / "again")


def test_back_off_grows_and_the_budget_ends_it(
    healthy: StoreProxy, empty_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy.plan = lambda request: Fault.SLOW_DOWN
    delays: list[float] = []
    said: list[str] = []
    now = [0.0]

    def wait(seconds: float) -> None:
        delays.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("finetune_trainer.storage.client.time.monotonic", lambda: now[0])
    store = Store(healthy.endpoint, "us-east-1", empty_store.credentials, wait=wait).for_background(60, said.append)
    with pytest.raises(OutsideFailure, match="SlowDown"):
        store.read(BUCKET, "key")
    assert delays == [0.5, 1, 2, 4, 8, 10, 10, 10, 10]
    assert len(said) == len(delays) + 1
    assert all("SlowDown" in sentence for sentence in said)


def test_rotated_credentials_and_a_bucket_that_comes_back_are_waited_for_in_the_background(
    empty_store: ObjectStore, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    write_credentials(keys, "old", "rotated-away")
    said: list[str] = []

    def rotate(_: float) -> None:
        if len(said) >= 2:  # Replace the keys after two failures were reported.
            write_credentials(keys, ACCESS_KEY, SECRET_KEY)

    impatient = Store(empty_store.endpoint, "us-east-1", keys, wait=rotate)
    with pytest.raises(OutsideFailure, match=r"credentialsSecretRef: .* refused the credentials.*InvalidAccessKeyId"):
        impatient.read(BUCKET, "key")
    store = impatient.for_background(60, said.append)
    store.write(BUCKET, "rotated", b"done")
    assert ["refused the credentials" in sentence for sentence in said] == [True, True, False]
    assert said[-1] == ""

    said.clear()

    def make_bucket(_: float) -> None:
        if len(said) == 2:
            empty_store.client.make_bucket("comes-back")

    Store(empty_store.endpoint, "us-east-1", keys, wait=make_bucket).for_background(60, said.append).write(
        "comes-back", "key", b"done"
    )
    assert "bucket 'comes-back' does not exist" in said[0]


def test_a_wrong_clock_is_named_and_passes(
    empty_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from datetime import datetime, timedelta

    from minio import time as minio_time

    right: Callable[[], datetime] = minio_time.utcnow
    said: list[str] = []
    offset = [timedelta(hours=3)]

    def skewed() -> datetime:
        return right() + offset[0]

    def set_clock(_: float) -> None:
        offset[0] = timedelta(0)

    monkeypatch.setattr(minio_time, "utcnow", skewed)
    store = Store(empty_store.endpoint, "us-east-1", empty_store.credentials, wait=set_clock)
    store.for_background(60, said.append).write(BUCKET, "clock", b"done")
    assert "RequestTimeTooSkewed" in said[0]
    assert "clock of this node" in said[0]


@pytest.mark.long
def test_a_full_disk_is_waited_for_and_named(minio: Path, tmp_path: Path) -> None:
    """The disk is full, and somebody deletes other objects while the upload is being retried."""
    with small_store(minio, tmp_path / "small") as small:
        assert fill(small, tmp_path) > 1
        said: list[str] = []
        freed: list[int] = []

        def heard(sentence: str) -> None:
            said.append(sentence)
            if len(said) >= 2 and not freed:
                freed.append(make_room(small, tmp_path / "small"))

        files = write_files(tmp_path / "files")
        files[0].write_bytes(b"\2" * 8_000_000)
        store = Store(small.endpoint, "us-east-1", small.credentials, budget_seconds=0)
        root = RunRoot(store.for_background(BACKGROUND_BUDGET_SECONDS, heard), parse_uri(f"s3://{BUCKET}/full"))
        claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod"))
        began = time.monotonic()
        commit_checkpoint(root, files, 1)
        assert assert_every_commit_verifies(small, "full/") == 1
        assert freed
        assert all(FULL.search(sentence) for sentence in said if sentence), said
        assert said[-1] == ""
        # After the objects are deleted, the upload may wait for one pause between two tries. The test adds 10 s and
        # allows three times the sum, because the machine may be busy.
        assert time.monotonic() - began < 3 * (LONGEST_DELAY_SECONDS + 10)


def test_uploads_that_were_cut_off_are_aborted_at_the_next_start(empty_store: ObjectStore, tmp_path: Path) -> None:
    root = root_at(empty_store.endpoint, empty_store.credentials, "stale")
    client = empty_store.client
    ours = f"faults/stale/{checkpoint_folder(1, 5)}/state-00000-of-00001.safetensors"
    for key in (ours, "faults/stale-of-another-job/object"):
        upload = client._create_multipart_upload(BUCKET, key, {})
        client._upload_part(BUCKET, key, b"x" * 5_000_000, None, upload, 1)
    assert root.abort_multipart_uploads() == [ours]
    left = {item.object_name for item in client._list_multipart_uploads(BUCKET).uploads}
    assert left == {"faults/stale-of-another-job/object"}
    assert root.abort_multipart_uploads() == []
