"""What a folder store refuses, whose files it touches, and what it leaves: names, links, special files, permissions."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_core.layout import parse_uri
from finetune_trainer.pod.errors import Damaged, OutsideFailure
from finetune_trainer.preflight.store_check import check_store
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.retries import Retries
from finetune_trainer.storage.root import RunRoot
from tests.trainer.objectstore import BUCKET

Request = Callable[[FolderStore, str, Path], object]
READING: dict[str, Request] = {
    "read": lambda store, key, _: store.read(BUCKET, key),
    "read_range": lambda store, key, _: store.read_range(BUCKET, key, 0, 9),
    "download": lambda store, key, file: store.download(BUCKET, key, file),
}
WRITING: dict[str, Request] = {
    "write": lambda store, key, _: store.write(BUCKET, key, b"new"),
    "create": lambda store, key, _: store.create(BUCKET, key, b"new"),
    "upload": lambda store, key, file: store.upload(BUCKET, key, file),
}
ALL: dict[str, Request] = {**READING, **WRITING, "delete": lambda store, key, _: store.delete(BUCKET, [key])}
FOLDERS: dict[str, Request] = {
    "list_objects": lambda store, key, _: store.list_objects(BUCKET, f"{key}/"),
    "list_folders": lambda store, key, _: store.list_folders(BUCKET, f"{key}/", 9),
    "abort": lambda store, key, _: store.abort_multipart_uploads(BUCKET, f"{key}/"),
}
NO_NAMES = [
    "",
    "..",
    "../x",
    "a/../../x",
    "/x",
    "/",
    "a//x",
    "a/",
    ".",
    "a/./x",
    "a/..",
    ".partial-1",
    "a/.partial-1/x",
]
NO_NAMES += ["a\0x", "a/\ud800"]


def never(seconds: float) -> None:
    raise AssertionError("a request that can't succeed was about to be repeated")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the store, with a file that nothing may read or change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture
def store(tmp_path: Path, outside: Path) -> Iterator[FolderStore]:
    """An empty store, in which no request is repeated. At the end, what lies beside it is as before."""
    folder = tmp_path / "store"
    folder.mkdir()
    yield FolderStore(folder, Retries(str(folder), wait=never))
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "outside", "store"}
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"local")
    return path


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("request_", [*ALL, *FOLDERS])
def test_a_name_that_would_lead_elsewhere_is_refused_at_once(
    request_: str, name: str, store: FolderStore, file: Path
) -> None:
    background = store.for_background(60, lambda sentence: None)
    for tried in (store, background):
        with pytest.raises(OutsideFailure, match=r"^storage\.folder: .* can't name an object in .*, because of '"):
            (ALL | FOLDERS)[request_](tried, name, file)
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("bucket", ["", "..", "a/b", "."])
def test_a_bucket_is_one_folder(bucket: str, store: FolderStore, file: Path) -> None:
    with pytest.raises(OutsideFailure, match="can't name an object"):
        store.write(bucket, "key", b"data")
    with pytest.raises(OutsideFailure, match="can't name an object"):
        store.list_objects(bucket, "")


@pytest.mark.parametrize("request_", ALL)
def test_a_linked_folder_is_not_entered(request_: str, store: FolderStore, outside: Path, file: Path) -> None:
    store.write(BUCKET, "runs/1/record", b"data")
    for path, key in (("runs/linked", "runs/linked/secret"), ("runs/1/linked", "runs/1/linked/deeper/secret")):
        link = store.folder / BUCKET / path
        link.symlink_to(outside)
        with pytest.raises(Damaged, match=f"storage.folder: {link} is a symbolic link, and a store holds only"):
            ALL[request_](store, key, file)


@pytest.mark.parametrize("request_", FOLDERS)
def test_a_listing_does_not_leave_out_what_it_can_not_enter(request_: str, store: FolderStore, outside: Path) -> None:
    """Without the error, a run would begin anew where somebody moved its checkpoints to another disk and left a
    link."""
    store.write(BUCKET, "runs/1/record", b"data")
    (store.folder / BUCKET / "runs" / "1" / "checkpoints").symlink_to(outside)
    with pytest.raises(Damaged, match="checkpoints is a symbolic link"):
        FOLDERS[request_](store, "runs/1/checkpoints", outside)
    if request_ == "list_objects":
        with pytest.raises(Damaged, match="checkpoints is a symbolic link"):
            FOLDERS[request_](store, "runs", outside)


@pytest.mark.parametrize("request_", ALL)
@pytest.mark.parametrize("target", ["secret", "does not exist"])
def test_a_linked_object_is_not_followed(
    request_: str, target: str, store: FolderStore, outside: Path, file: Path
) -> None:
    link = store.folder / BUCKET / "object"
    link.parent.mkdir()
    link.symlink_to(outside / target)
    if request_ in ("write", "upload"):
        ALL[request_](store, "object", file)
        assert store.read(BUCKET, "object") in (b"new", b"local")
    elif request_ == "delete":
        ALL[request_](store, "object", file)
        assert not link.is_symlink()
    else:
        with pytest.raises(Damaged, match=f"{link} is a symbolic link"):
            ALL[request_](store, "object", file)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


@pytest.mark.parametrize("request_", [*READING, "list_objects"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (make_socket, "a socket")])
def test_a_special_file_is_not_opened_and_not_waited_for(
    make: Callable[[Path], None], kind: str, request_: str, store: FolderStore, file: Path
) -> None:
    path = store.folder / BUCKET / "folder" / "object"
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(Damaged, match=f"{path} is {kind}, and a store holds only folders and files"):
        (ALL | FOLDERS)[request_](store, "folder" if request_ == "list_objects" else "folder/object", file)
    store.write(BUCKET, "folder/object", b"data")
    assert store.read(BUCKET, "folder/object") == b"data"


def test_a_file_can_not_be_a_folder_too(store: FolderStore, file: Path) -> None:
    store.write(BUCKET, "a", b"data")
    with pytest.raises(OutsideFailure, match=r"storage.folder: .*/a/b can't be written \(Not a directory\)"):
        store.write(BUCKET, "a/b", b"data")
    store.write(BUCKET, "b/c", b"data")
    with pytest.raises(OutsideFailure, match=r"storage.folder: .*/b can't be written \(Is a directory\)"):
        store.write(BUCKET, "b", b"data")
    assert not store.create(BUCKET, "b", b"data")
    assert [entry.key for entry in store.list_objects(BUCKET, "")] == ["a", "b/c"]


def test_only_the_user_may_read_what_is_written(store: FolderStore, file: Path) -> None:
    store.folder.chmod(0o755)
    file.chmod(0o644)
    before = os.umask(0)
    try:
        store.write(BUCKET, "a/written", b"data")
        store.create(BUCKET, "a/created", b"data")
        store.upload(BUCKET, "b/uploaded", file)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in store.folder.rglob("*")}
    assert len(modes) == 6
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o755


@pytest.mark.parametrize("is_file", [False, True])
def test_the_folder_itself_is_never_made(is_file: bool, tmp_path: Path) -> None:
    """It may be the mount point of a disk that is not mounted now. Then a run would begin anew on the disk below."""
    folder = tmp_path / "disk" / "store"
    folder.parent.mkdir()
    if is_file:
        folder.write_text("no folder")
    gone = FolderStore(folder, Retries(str(folder), wait=never))
    for request in (*ALL.values(), *FOLDERS.values()):
        (tmp_path / "file").write_bytes(b"local")
        with pytest.raises(OutsideFailure, match=f"^storage.folder: there is no folder {folder}$"):
            request(gone, "key", tmp_path / "file")
    assert folder.exists() == is_file


def test_background_work_waits_until_the_folder_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    heard: list[str] = []

    def wait(seconds: float) -> None:
        folder.mkdir()

    store = FolderStore(folder, Retries(str(folder), wait=wait)).for_background(60, heard.append)
    store.write(BUCKET, "key", b"data")
    assert heard == [f"storage.folder: there is no folder {folder}", ""]
    assert store.read(BUCKET, "key") == b"data"


def test_folders_without_objects_go_and_the_store_stays(store: FolderStore, file: Path) -> None:
    keys = ["runs/1/a/x", "runs/1/a/y", "runs/2/z"]
    for key in keys:
        store.write(BUCKET, key, b"data")
    store.delete(BUCKET, keys[:2])
    assert sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*")) == [
        BUCKET,
        f"{BUCKET}/runs",
        f"{BUCKET}/runs/2",
        f"{BUCKET}/runs/2/z",
    ]
    store.delete(BUCKET, [*keys, "runs"])
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("seconds", [-(10**9), 300 * 10**9])
def test_a_file_of_any_time_is_listed_with_a_time_that_records_can_hold(
    seconds: int, store: FolderStore, file: Path
) -> None:
    store.write(BUCKET, "key", b"data")
    os.utime(store.folder / BUCKET / "key", (seconds, seconds))
    (entry,) = store.list_objects(BUCKET, "")
    assert datetime(1970, 1, 1, tzinfo=UTC) <= entry.modified < datetime(9000, 1, 1, tzinfo=UTC)


def test_the_check_of_the_store_accepts_a_folder_and_leaves_nothing(store: FolderStore, file: Path) -> None:
    root = RunRoot(store, parse_uri(f"s3://{BUCKET}/runs/default/job/uid"))
    check_store(root)
    assert list(store.folder.iterdir()) == []
    assert root.uri("checkpoints/1") == f"{store.folder}/{BUCKET}/runs/default/job/uid/checkpoints/1"
