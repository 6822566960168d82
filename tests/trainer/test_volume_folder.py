"""A folder on a volume that other pods share: what is in it, who else writes to it, and how full the volume is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.pod import volume_folder
from finetune_trainer.pod.volume_folder import LEFTOVER_SECONDS, Shares, VolumeFolder
from tests.trainer.small_volume import mounted

MIB = 1 << 20
NAME = "files"


def opened(mount: Path) -> VolumeFolder:
    return VolumeFolder(mount, NAME, lambda name: name.startswith("ours-"), lambda name: name.endswith(".turn"))


def put(folder: VolumeFolder, name: str, content: bytes, keep: tuple[str, ...] = ()) -> None:
    with folder.new_file(len(content), keep) as new:
        new.write(content)
        new.name(name)


def content_of(folder: VolumeFolder, name: str) -> bytes | None:
    with folder.opened(name) as file:
        return None if file is None else file.read()


def names(mount: Path) -> list[str]:
    return sorted(file.name for file in (mount / NAME).iterdir())


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A volume of 64 MiB, of which the folder may hold 60.8 MiB."""
    mount = tmp_path / "volume"
    mount.mkdir()
    with mounted(mount, "64m"):
        yield mount


def test_a_file_has_its_content_and_is_replaced_by_a_newer_one(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        assert content_of(folder, "ours-a") is None
        put(folder, "ours-a", b"first")
        put(folder, "ours-a", b"second")
        assert content_of(folder, "ours-a") == b"second"
        folder.discard("ours-a")
        folder.discard("ours-a")
        assert content_of(folder, "ours-a") is None
    assert names(tmp_path) == []


def test_a_file_without_a_name_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        with folder.new_file(1) as new:
            new.write(b"x")
        with pytest.raises(TypeError), folder.new_file(1) as new:
            new.write("no bytes")  # type: ignore[arg-type]
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_absent_and_deleted(kind: str, tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        path, other = tmp_path / NAME / "ours-a", tmp_path / "other"
        other.write_bytes(b"a secret of the node")
        if kind == "link":
            path.symlink_to(other)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        assert content_of(folder, "ours-a") is None
        assert path.exists() is (kind == "folder"), "only an empty folder of somebody else stays"
        assert other.read_bytes() == b"a secret of the node"


def test_a_folder_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)):
        opened(tmp_path)


def test_a_link_that_takes_the_place_of_the_folder_later_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with opened(tmp_path) as folder:
        (tmp_path / NAME).rename(tmp_path / "moved")
        (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
        put(folder, "ours-a", b"x")
    assert [file.name for file in (tmp_path / "moved").iterdir()] == ["ours-a"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_files_that_were_not_used_for_longest_make_room(small_volume: Path) -> None:
    with opened(small_volume) as folder:
        (small_volume / NAME / "of somebody else").write_bytes(b"x")
        for name in ("ours-a", "ours-b", "ours-c"):
            put(folder, name, bytes(18 * MIB))
        for age, name in enumerate(("ours-b", "ours-c", "ours-a")):
            os.utime(small_volume / NAME / name, (age, age))
        folder.note_use("ours-b")
        put(folder, "ours-d", bytes(18 * MIB), keep=("ours-c",))
        assert names(small_volume) == ["of somebody else", "ours-b", "ours-c", "ours-d"]


def test_a_file_that_can_never_fit_displaces_no_other(small_volume: Path) -> None:
    with opened(small_volume) as folder:
        put(folder, "ours-a", bytes(20 * MIB))
        put(folder, "ours-b", bytes(20 * MIB))
        assert 60 * MIB < folder.largest_bytes < 61 * MIB
        for size, keep in ((62 * MIB, ()), (45 * MIB, ("ours-a",))):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), folder.new_file(size, keep):
                pytest.fail("there is no room")
        assert names(small_volume) == ["ours-a", "ours-b"]


def test_a_volume_that_fills_up_while_a_file_is_written_keeps_no_part_of_it(small_volume: Path) -> None:
    with opened(small_volume) as folder:
        with folder.new_file(30 * MIB) as new:
            (small_volume / "ballast").write_bytes(bytes(50 * MIB))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                new.write(bytes(30 * MIB))
        assert names(small_volume) == []


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["ours-a", "ours-b", "unfinished-a", "unfinished-b", "a.turn", "b.turn", "other"]),
        st.integers(0, 3 * LEFTOVER_SECONDS),
    )
)
def test_only_old_leftovers_are_removed_where_there_is_room(
    tmp_path_factory: pytest.TempPathFactory, ages: dict[str, int]
) -> None:
    """Ages are measured back from the newest file, because the volume may have another clock."""
    mount = tmp_path_factory.mktemp("volume")
    with opened(mount) as folder:
        for name, age in ages.items():
            (mount / NAME / name).write_bytes(b"x")
            os.utime(mount / NAME / name, (1e9 - age, 1e9 - age))
        with folder.new_file(1):
            left = {name for name in names(mount) if name in ages}
    oldest = min(ages.values(), default=0) + LEFTOVER_SECONDS
    is_leftover = {name: name.startswith("unfinished-") or name.endswith(".turn") for name in ages}
    assert left == {name for name, age in ages.items() if not (is_leftover[name] and age > oldest)}


def test_a_folder_with_endless_files_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may have filled the folder to exhaust the memory of each pod that makes room in it."""
    monkeypatch.setattr(volume_folder, "MOST_FILES", 3)
    with opened(tmp_path) as folder:
        for name in "abc":
            put(folder, f"ours-{name}", b"x")
        (tmp_path / NAME / "ours-d").write_bytes(b"x")
        with pytest.raises(OSError, match="more than 3 files lie in the folder"):
            put(folder, "ours-e", b"x")
        assert content_of(folder, "ours-a") == b"x", "what is there can be read"
    assert names(tmp_path) == ["ours-a", "ours-b", "ours-c", "ours-d"]


def test_a_folder_with_a_share_of_the_volume_takes_no_more(small_volume: Path) -> None:
    """The oldest of its own files goes although the volume has room, and the files of another folder stay."""
    with opened(small_volume) as others:
        put(others, "ours-x", bytes(5 * MIB))
    with VolumeFolder(small_volume, "few", lambda name: name.startswith("ours-"), shares=Shares(0.5)) as folder:
        assert folder.largest_bytes == 32 * MIB
        for age, name in enumerate(("ours-a", "ours-b")):
            put(folder, name, bytes(15 * MIB))
            os.utime(small_volume / "few" / name, (age, age))
        put(folder, "ours-c", bytes(15 * MIB))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            put(folder, "ours-d", bytes(33 * MIB))
    assert sorted(file.name for file in (small_volume / "few").iterdir()) == ["ours-b", "ours-c"]
    assert names(small_volume) == ["ours-x"]


def test_a_folder_that_may_take_of_the_free_room_finds_some_on_a_volume_that_another_folder_fills(
    small_volume: Path,
) -> None:
    with opened(small_volume) as others:
        put(others, "ours-x", bytes(others.largest_bytes // MIB * MIB))
    for share, is_room in ((0.0, False), (0.6, True)):
        shares = Shares(0.1, share)
        with VolumeFolder(small_volume, "few", lambda name: name.startswith("ours-"), shares=shares) as folder:
            if is_room:
                put(folder, "ours-a", bytes(MIB))
            else:
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    put(folder, "ours-a", bytes(MIB))
    with opened(small_volume) as others:
        put(others, "ours-y", bytes(MIB))
    assert names(small_volume) == ["ours-y"], "the files of the first folder still make room for each other"
