"""`finetune checkpoints` lists the checkpoints in a real object store, and shows whether each is committed, damaged or
unfinished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from finetune_cli.bucket.checkpoints import (
    COMMITTED,
    DAMAGED,
    UNFINISHED,
    _perplexity,
    as_json,
    as_table,
    inspect_checkpoints,
)
from finetune_cli.bucket.object_store import AccessKey, ObjectStoreReader
from finetune_core.layout import COMMIT, MANIFEST, Location, Manifest, ManifestFile, digest
from tests.cli.test_download import put, spec
from tests.cli.test_main import finetune
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore

STATE = "state-00000-of-00001.safetensors"


def commit(store: ObjectStore, root: Location, run: int, step: int, perplexity: float | None) -> str:
    """Write a checkpoint with COMMIT, as a trainer does, and return the key of its folder."""
    folder = root.key(f"checkpoints/{run:06d}-{step:09d}")
    contents = {STATE: b"tensors" * 1000, "trainer.json": json.dumps({"perplexity": perplexity}).encode()}
    for name, content in contents.items():
        put(store, f"{folder}/{name}", content)
    files = [ManifestFile(name=name, bytes=len(data), sha256=digest(data)) for name, data in contents.items()]
    encoded = Manifest(kind="Checkpoint", run=run, step=step, files=files).encode()
    put(store, f"{folder}/{MANIFEST}", encoded)
    put(store, f"{folder}/{COMMIT}", digest(encoded).encode())
    return folder


@pytest.fixture
def root(store: ObjectStore, tmp_path: Path) -> Location:
    """The folder of a job's runs. It contains four checkpoints: two complete ones, one with a changed byte, and one
    without COMMIT."""
    place = Location(BUCKET, f"listed/{tmp_path.name}")
    commit(store, place, 1, 20, 2.5)
    commit(store, place, 1, 40, 3.5)
    damaged = commit(store, place, 2, 60, 1.5)
    data = bytearray(store.read(f"{damaged}/{STATE}"))
    data[3000] ^= 1
    put(store, f"{damaged}/{STATE}", bytes(data))
    put(store, f"{place.key('checkpoints/000002-000000080')}/{STATE}", b"half")
    return place


@pytest.fixture
def source(store: ObjectStore) -> ObjectStoreReader:
    return ObjectStoreReader(spec(store), AccessKey(ACCESS_KEY, SECRET_KEY))


def test_sizes_and_commits_are_compared_and_with_verify_every_byte(source: ObjectStoreReader, root: Location) -> None:
    quick = inspect_checkpoints(source, root, verify=False, progress=lambda folder: None)
    assert [(item.run, item.step, item.state) for item in quick] == [
        (1, 20, COMMITTED),
        (1, 40, COMMITTED),
        (2, 60, COMMITTED),
        (2, 80, UNFINISHED),
    ]
    told: list[str] = []
    found = inspect_checkpoints(source, root, verify=True, progress=told.append)
    assert [item.state for item in found] == [COMMITTED, COMMITTED, DAMAGED, UNFINISHED]
    assert found[2].problem == f"{STATE} has another sha256 than {MANIFEST} says"
    assert [(item.step, item.last, item.best) for item in found if item.last or item.best] == [
        (20, False, True),
        (40, True, False),
    ]
    assert len(told) == 4


def test_what_a_run_removes_or_somebody_deletes_while_it_is_looked_at(
    store: ObjectStore, source: ObjectStoreReader, root: Location
) -> None:
    removed = root.key("checkpoints/000001-000000020")
    damaged = f"{root.key('checkpoints/000001-000000040')}/{STATE}"

    def meanwhile(folder: str) -> None:
        if folder.endswith("000020"):
            for name in (COMMIT, MANIFEST, STATE, "trainer.json"):
                store.client.remove_object(BUCKET, f"{removed}/{name}")
        if folder.endswith("000040"):
            store.client.remove_object(BUCKET, damaged)

    found = inspect_checkpoints(source, root, verify=True, progress=meanwhile)
    assert [(item.step, item.state) for item in found] == [(40, DAMAGED), (60, DAMAGED), (80, UNFINISHED)]
    assert found[0].problem == f"{STATE} is missing"


def test_a_truncated_file_and_a_missing_manifest_show_without_reading_all(
    store: ObjectStore, source: ObjectStoreReader, root: Location
) -> None:
    put(store, f"{root.key('checkpoints/000001-000000020')}/{STATE}", b"short")
    store.client.remove_object(BUCKET, f"{root.key('checkpoints/000001-000000040')}/{MANIFEST}")
    found = inspect_checkpoints(source, root, verify=False, progress=lambda folder: None)
    assert found[0].problem == f"{STATE} has 5 bytes, {MANIFEST} says 7000"
    assert found[1].problem == f"{MANIFEST} is missing"


def test_json_and_table_say_the_same(source: ObjectStoreReader, root: Location) -> None:
    found = inspect_checkpoints(source, root, verify=True, progress=lambda folder: None)
    listed = json.loads(json.dumps(as_json(root, found)))
    assert listed["root"] == root.uri()
    assert [item["state"] for item in listed["checkpoints"]] == [item.state for item in found]
    assert listed["checkpoints"][1]["last"] is True
    assert len(listed["checkpoints"][0]["manifestSha256"]) == 64
    console = Console(width=200, record=True)
    console.print(as_table(root, found))
    lines = console.export_text().splitlines()
    assert [line.split()[:2] for line in lines[2:6]] == [["1", "20"], ["1", "40"], ["2", "60"], ["2", "80"]]
    assert "damaged" in lines[4]
    assert lines[4].rstrip().endswith(f"{STATE} has another sha256 than {MANIFEST} says")


@pytest.mark.parametrize(
    "value",
    ["null", "NaN", "Infinity", "1e999", '"2.5"', "[]", "9" * 400, "9" * 5000, "[" * 100_000],
    ids=["null", "NaN", "infinity", "too large", "a text", "a list", "400 digits", "5000 digits", "deep lists"],
)
def test_a_perplexity_that_is_no_finite_number_is_left_out(value: str) -> None:
    assert _perplexity(b'{"perplexity": ' + value.encode() + b"}") is None
    assert _perplexity(value.encode()) is None
    assert _perplexity(b'{"perplexity": 2.5}') == 2.5


def test_help_has_examples(tmp_path: Path) -> None:
    done = finetune(tmp_path, "checkpoints", "--help")
    assert done.returncode == 0
    assert "finetune checkpoints quickstart --verify" in done.stdout
