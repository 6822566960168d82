"""A process that writes into a folder store is killed at any of its system calls, and the disk fails. The store then
holds the old content or the new one, and never a part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.folder.folder_entries import PARTIAL, Placing, put_file
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.retries import Retries
from tests.trainer.objectstore import BUCKET
from tests.trainer.small_volume import mounted
from tests.trainer.storing import KEY, NEW, OLD, unfinished

CONTENT_BEFORE = {"create": "none", "write": "old", "upload": "old", "delete": "old"}
CONTENT_AFTER = {"create": "new", "write": "new", "upload": "new", "delete": "none"}
SIZES = {"none": [], "old": [len(OLD)], "new": [len(NEW)]}


def storing(*arguments: str) -> Any:
    """Run the program `storing` and return what it printed."""
    command = [sys.executable, "-m", "tests.trainer.storing", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("operation", CONTENT_BEFORE)
def test_a_process_that_is_killed_at_any_system_call_leaves_the_old_object_or_the_new_one(
    operation: str, tmp_path: Path
) -> None:
    before, after = CONTENT_BEFORE[operation], CONTENT_AFTER[operation]
    found = storing("kills", str(tmp_path), operation)
    assert len(found) > 10, "the operation has more system calls than these"
    contents = [end["content"] for end in found]
    changed = contents.index(after)
    assert contents == [before] * changed + [after] * (len(found) - changed)
    assert 0 < changed < len(found) - 1, "the object changes in the middle of the operation"
    for end in found:
        assert end["sizes"] == SIZES[end["content"]], "what is unfinished is not listed"
        assert end["left"] == end["aborted"] <= 1
        assert end["left_then"] == 0
        assert end["content_then"] == end["content"], "only what is unfinished is removed"
        assert end["content_at_last"] == after, "the next process can do the same again"
    assert [end["killed"] for end in found] == [True] * (len(found) - 1) + [False]
    assert found[-1]["left"] == 0
    if operation != "delete":
        assert any(end["left"] for end in found), "a process was killed in the middle of writing"


@pytest.mark.parametrize(
    ("operation", "placing"),
    [("create", "linkat"), ("write", "renameat"), ("upload", "renameat"), ("delete", "unlinkat")],
)
def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_operation_ends(
    operation: str, placing: str, tmp_path: Path
) -> None:
    calls = [(name, first) for name, first in storing("calls", str(tmp_path), operation)]
    if not calls:
        pytest.skip("the numbers of the system calls of this kind of processor are not known here")
    names = [name for name, _ in calls]
    placed = names.index(placing)
    writes = [number for number, name in enumerate(names) if name == "write"]
    folder = calls[placed][1]
    assert ("fsync", folder) in calls[placed:], "the names in the folder are on the disk when the operation ends"
    if operation != "delete":
        assert max(writes) < placed
        assert ("fsync", calls[max(writes)][1]) in calls[max(writes) : placed]
    for (name, above), (following, synced) in pairwise(calls):
        if name.startswith("mkdir"):
            assert (following, synced) == ("fsync", above), "a new folder is on the disk before something lies in it"


@pytest.mark.parametrize(
    ("operation", "call", "error", "lasts", "sentence"),
    [
        ("upload", "fsync", "EIO", False, "{object} can't be written (Input/output error)"),
        ("upload", "read", "EIO", False, "{sent} can't be read (Input/output error)"),
        ("write", "write", "ENOSPC", False, "{object} can't be written (No space left on device)"),
        ("write", "write", "EDQUOT", False, "{object} can't be written (Disk quota exceeded)"),
        ("write", "write", "EFBIG", True, "{object} can't be written (File too large)"),
        ("write", "write", "ESTALE", False, "{object} can't be written (Stale file handle)"),
        ("read", "read", "EIO", False, "{object} can't be read (Input/output error)"),
        ("create", "mkdirat", "EROFS", True, "{object} can't be written by user {user} (Read-only file system)"),
        ("create", "mkdirat", "EACCES", True, "{object} can't be written by user {user} (Permission denied)"),
        ("create", "linkat", "EPERM", True, "{no_links} (Operation not permitted), by which"),
        ("create", "linkat", "EOPNOTSUPP", True, "{no_links} (Operation not supported), by which"),
        ("delete", "unlinkat", "EACCES", True, "{folder} can't be changed by user {user} (Permission denied)"),
    ],
)
def test_what_the_file_system_refuses_is_one_sentence_and_is_tried_again_where_it_may_pass(
    operation: str, call: str, error: str, lasts: bool, sentence: str, tmp_path: Path
) -> None:
    ended = storing("refused", str(tmp_path), operation, call, error)
    store = tmp_path / "store"
    expected = "storage.folder: " + sentence.format(
        object=store / BUCKET / KEY,
        folder=(store / BUCKET / KEY).parent,
        sent=tmp_path / "new",
        no_links=f"the file system of {store} has no hard links",
        user=os.getuid(),
    )
    assert [heard.startswith(expected) for heard in ended["heard"]] == [True, True], ended["heard"]
    assert "\n" not in "".join(ended["heard"])
    assert ended["repeated"] == [not lasts, True], "in the background, people can correct what lasts"
    # Where the deletion itself is refused, an unfinished file stays until a later run removes it.
    assert call == "unlinkat" or not [name for name in ended["names"] if name.startswith(PARTIAL)]


def test_a_full_disk_leaves_the_old_object_and_is_tried_again_until_there_is_room(tmp_path: Path) -> None:
    heard: list[str] = []
    waits: list[float] = []
    with mounted(tmp_path, "1m"):
        store = FolderStore.at(tmp_path)
        store.write(BUCKET, KEY, OLD)
        store.write(BUCKET, "ballast", b"\1" * 600_000)

        def wait(seconds: float) -> None:
            waits.append(seconds)
            assert store.read(BUCKET, KEY) == OLD
            assert not unfinished(tmp_path)
            if len(waits) == 3:
                store.delete(BUCKET, ["ballast"])

        patient = FolderStore(tmp_path, Retries(str(tmp_path), 60, on_attempt=heard.append, wait=wait))
        patient.write(BUCKET, KEY, b"\2" * 600_000)
        assert store.read(BUCKET, KEY) == b"\2" * 600_000
        with pytest.raises(OutsideFailure, match=r"storage.folder: .* can't be written \(No space left on device\)"):
            store.with_budget(0).write(BUCKET, "more", b"\3" * 600_000)
        assert [entry.key for entry in store.list_objects(BUCKET, "")] == [KEY]
    assert len(waits) == 3
    assert heard[-1] == ""
    assert all("No space left on device" in sentence for sentence in heard[:-1])


def test_a_file_that_somebody_removes_while_it_is_written_is_written_again(tmp_path: Path) -> None:
    store = FolderStore.at(tmp_path)
    contents: list[bytes] = []

    def fill(file: int) -> bytes:
        data = b"written a second time" if contents else b"written once"
        os.write(file, data)
        if not contents:
            # The first time, another process aborts what is unfinished, and the folder is then empty and goes too.
            assert len(store.abort_multipart_uploads(BUCKET, "a/")) == 1
            assert not (tmp_path / BUCKET).exists()
        contents.append(data)
        return data

    def rename(placing: Placing) -> bool:
        os.rename(placing.partial, placing.name, src_dir_fd=placing.folder, dst_dir_fd=placing.folder)
        return True

    filled, is_placed = put_file(tmp_path, [BUCKET, "a", "b", "object"], fill, rename)
    assert (filled, is_placed) == (b"written a second time", True)
    assert store.read(BUCKET, "a/b/object") == b"written a second time"
    assert len(contents) == 2
