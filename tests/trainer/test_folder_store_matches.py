"""A folder store gives the same answers as a real MinIO: for any sequence of requests, and to processes that use it at
the same time."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_core.layout import Location
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import RunStore
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.storing import RACED

KEYS = [
    "ARTIFACT",
    "runs/000001.json",
    "runs/000002.json",
    "checkpoints/000001-000000005/COMMIT",
    "checkpoints/000001-000000005/state-0.safetensors",
    "checkpoints/000001-000000010/COMMIT",
    # A listing is ordered by key, and not folder by folder.
    "a/x",
    "a-b/x",
    "a.b",
    "ä ö/% ß+",
]
NO_KEYS = ["runs", "checkpoints", "ARTIFACT/x", "none/x"]
"""Keys that no object has: those of folders, and of objects in folders that do not exist."""
PREFIXES = ["", "runs/", "runs/0", "checkpoints/", "checkpoints/000001-000000005/", "a", "a/", "none/", "none", "ARTI"]
FOLDERS = ["", "runs/", "checkpoints/", "a/", "none/"]
CONTENTS = [b"", b"one", b"two", b"long " * 1000]
Request = Callable[[RunStore, Location, Path], Any]
PROCESSES = 4


def write(key: str, data: bytes) -> Request:
    return lambda store, at, _: store.write(at.bucket, at.key(key), data)


def create(key: str, data: bytes) -> Request:
    return lambda store, at, _: store.create(at.bucket, at.key(key), data)


def upload(key: str, data: bytes) -> Request:
    def request(store: RunStore, at: Location, folder: Path) -> Any:
        (folder / "sent").write_bytes(data)
        return store.upload(at.bucket, at.key(key), folder / "sent")

    return request


def download(key: str) -> Request:
    def request(store: RunStore, at: Location, folder: Path) -> Any:
        path = folder / "received"
        path.unlink(missing_ok=True)
        return store.download(at.bucket, at.key(key), path), path.read_bytes() if path.exists() else None

    return request


def read(key: str) -> Request:
    return lambda store, at, _: store.read(at.bucket, at.key(key))


def read_range(key: str, start: int, length: int) -> Request:
    return lambda store, at, _: store.read_range(at.bucket, at.key(key), start, length)


def read_at_most(key: str, limit: int) -> Request:
    return lambda store, at, _: RunRoot(store, at).read_at_most(key, limit)


def list_objects(prefix: str) -> Request:
    return lambda store, at, _: [
        (entry.key, entry.bytes) for entry in store.list_objects(at.bucket, f"{at.prefix}/{prefix}")
    ]


def list_folders(prefix: str, most: int) -> Request:
    return lambda store, at, _: store.list_folders(at.bucket, f"{at.prefix}/{prefix}", most)


def delete(keys: list[str]) -> Request:
    return lambda store, at, _: store.delete(at.bucket, [at.key(key) for key in keys])


def abort() -> Request:
    return lambda store, at, _: RunRoot(store, at).abort_multipart_uploads()


KEY, ANY_KEY, CONTENT = st.sampled_from(KEYS), st.sampled_from(KEYS + NO_KEYS), st.sampled_from(CONTENTS)
REQUESTS = st.one_of(
    st.builds(write, KEY, CONTENT),
    st.builds(create, KEY, CONTENT),
    st.builds(upload, KEY, CONTENT),
    st.builds(download, ANY_KEY),
    st.builds(read, ANY_KEY),
    st.builds(read_range, ANY_KEY, st.integers(0, 8), st.integers(1, 8)),
    st.builds(read_at_most, ANY_KEY, st.integers(0, 6)),
    st.builds(list_objects, st.sampled_from(PREFIXES)),
    st.builds(list_folders, st.sampled_from(FOLDERS), st.integers(0, 3)),
    st.builds(delete, st.lists(ANY_KEY, max_size=4)),
    st.builds(abort),
)


@pytest.fixture(scope="module")
def both(empty_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, RunStore, Path]:
    """An object store, a folder store, and a folder for local files."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "store").mkdir()
    there = Store(empty_store.endpoint, "us-east-1", empty_store.credentials, budget_seconds=0)
    return there, FolderStore.at(folder / "store", budget_seconds=0), folder


NUMBERS = itertools.count()


@given(requests=st.lists(REQUESTS, min_size=5, max_size=25))
@settings(max_examples=60)
def test_any_requests_have_the_same_answers(requests: list[Request], both: tuple[RunStore, RunStore, Path]) -> None:
    objects, here, folder = both
    at = Location(BUCKET, f"same/{next(NUMBERS)}")
    for request in [*requests, list_objects("")]:
        assert request(here, at, folder) == request(objects, at, folder)


def race(mode: str, store: str) -> list[list[str]]:
    """Let processes use a store at the same time, and return what each of them printed at its end."""
    command = [sys.executable, "-m", "tests.trainer.storing", mode, store]
    processes = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        return [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(params=["object store", "folder"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, RunStore]:
    """A store, and the argument that names it on the command line of `storing`."""
    if request.param == "folder":
        (tmp_path / "store").mkdir()
        return str(tmp_path / "store"), FolderStore.at(tmp_path / "store")
    server = request.getfixturevalue("empty_store")
    objects = Store(server.endpoint, "us-east-1", server.credentials)
    for prefix in ("raced/", "shared/"):
        objects.delete(BUCKET, [entry.key for entry in objects.list_objects(BUCKET, prefix)])
    return f"{server.endpoint} {server.credentials}", objects


def test_of_processes_that_create_an_object_at_the_same_time_exactly_one_succeeds(shared: tuple[str, RunStore]) -> None:
    argument, store = shared
    created = race("create", argument)
    assert sorted(key for keys in created for key in keys) == RACED
    assert len([keys for keys in created if keys]) > 1, "the processes did not run at the same time"
    for number, keys in enumerate(created):
        assert {store.read(BUCKET, key) for key in keys} <= {f"by process {number}".encode()}


def test_processes_that_share_folders_do_not_disturb_each_other(shared: tuple[str, RunStore]) -> None:
    argument, _ = shared
    assert race("own", argument) == [[]] * PROCESSES
