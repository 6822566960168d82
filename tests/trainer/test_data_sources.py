"""A file, a folder and a glob mean the same in a bucket, on a volume and on the hub. Whatever a bucket, a volume or the
hub answers becomes rows or a sentence."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_core.api.job import FineTuneJob
from finetune_core.api.sources import DataSource, HuggingFaceDataSource
from finetune_core.errors import UserError
from finetune_core.resolve import resolve
from finetune_trainer.data.files.index import read_index
from finetune_trainer.data.reader import read_rows
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.data_files import VolumeDataFiles, find_data_files
from finetune_trainer.sources.file_selection import below, chosen, is_glob, literal_prefix, matching, select
from finetune_trainer.sources.hub_datasets import HubDataFiles, card_configs, split_files
from finetune_trainer.sources.hub_requests import call_hub, read_token
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.inputs import data_file, source_name
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.run_store import ListedObject
from tests.core.jobs import quickstart
from tests.trainer.data_hub import Hub, served
from tests.trainer.objectstore import BUCKET, ObjectStore, write_credentials

FIELD = "dataset.train.s3.uri"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FILES = [
    "README.md",
    "train.jsonl",
    "archive/train.jsonl",
    "archive/old/train.jsonl",
    "archive/test.jsonl",
    "_tmp/train.jsonl",
    ".hidden/train.jsonl",
]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.jsonl", ["train.jsonl"]),
        ("**/train.jsonl", ["train.jsonl", "archive/train.jsonl", "archive/old/train.jsonl"]),
        ("archive/*", ["archive/train.jsonl", "archive/test.jsonl"]),
        ("archive/**", ["archive/train.jsonl", "archive/old/train.jsonl", "archive/test.jsonl"]),
        ("*/t[er]*.jsonl", ["archive/train.jsonl", "archive/test.jsonl"]),
        ("archive/t?st.jsonl", ["archive/test.jsonl"]),
        ("_tmp/*.jsonl", ["_tmp/train.jsonl"]),
        (".*/*", [".hidden/train.jsonl"]),
        ("nothing/*", []),
    ],
)
def test_a_glob_means_what_fsspec_says(glob: str, found: list[str]) -> None:
    assert matching(FILES, glob, FIELD) == found


@given(
    st.lists(st.text("ab./", min_size=1, max_size=8), max_size=8),
    st.text("ab*?[]./", min_size=1, max_size=8),
)
@example(["a", "b/a"], "**/a")
def test_a_glob_matches_the_files_that_fsspec_finds(paths: list[str], glob: str) -> None:
    files = {path for path in paths if not path.endswith("/") and "//" not in path and not path.startswith(("/", "."))}
    files = {path for path in files if not any(part.startswith(".") for part in path.split("/"))}
    files = {path for path in files if not any(other.startswith(f"{path}/") for other in files)}
    if glob.startswith("/") or glob.endswith("/") or "//" in glob or any(p.startswith(".") for p in glob.split("/")):
        return
    system = MemoryFileSystem()
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    for path in files:
        system.pipe_file(f"/{path}", b"")
    try:
        expected = sorted(name.lstrip("/") for name in system.glob(f"/{glob}") if system.isfile(name))
    except ValueError:
        with pytest.raises(UserError, match=f"^{FIELD}: has a malformed glob "):
            matching(sorted(files), glob, FIELD)
        return
    assert matching(sorted(files), glob, FIELD) == expected


@given(st.text(max_size=20))
def test_any_text_as_a_glob_is_a_match_or_a_sentence(glob: str) -> None:
    try:
        found = matching(FILES, glob, FIELD)
    except UserError as error:
        found = []
        assert "malformed glob" in error.problem  # noqa: PT017
    assert set(found) <= set(FILES)
    assert not is_glob(literal_prefix(glob))


def test_a_folder_means_all_files_below_it_that_are_not_hidden() -> None:
    assert below(FILES, "archive") == ["archive/train.jsonl", "archive/old/train.jsonl", "archive/test.jsonl"]
    assert below(["_tmp/a.txt", "_tmp/_SUCCESS", "_tmp/.a.crc"], "_tmp") == ["_tmp/a.txt"]
    assert below(FILES, "")[:2] == ["README.md", "train.jsonl"]
    assert below(["rows-2/a.txt"], "rows") == []


def test_files_are_chosen_in_the_order_of_their_paths_and_others_are_left_out_with_a_notice() -> None:
    chosen = select(["b.jsonl", "a.jsonl.gz", "notes.md", "c/", "dataset_infos.json"], FIELD, "s3://b/rows")
    assert chosen.paths == ["a.jsonl.gz", "b.jsonl"]
    (notice,) = chosen.notices
    assert notice == (
        f"{FIELD}: 2 files that are no data files are left out of s3://b/rows: dataset_infos.json, notes.md"
    )


def test_names_that_differ_in_case_are_different_files() -> None:
    assert select(["a.csv", "A.csv", "A.CSV.gz"], FIELD, "s3://b/rows").paths == ["A.CSV.gz", "A.csv", "a.csv"]


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (
            [],
            "there is no data file at s3://b/rows: the suffix must be .jsonl, .json, .csv, .tsv, .parquet or .txt,",
        ),
        (["a.xlsx"], "there is no data file at s3://b/rows; it holds a.xlsx: the suffix must be .jsonl"),
        (["a.csv", "b.tsv", "c.csv"], "s3://b/rows must have data files of one kind, and has a.csv, b.tsv: a glob can"),
        (["a.csv", "a.csv.gz"], "s3://b/rows has a.csv and a.csv.gz, which seem to be the same rows twice"),
        ([f"{number}.csv" for number in range(10_001)], "s3://b/rows has 10001 data files, more than 10000"),
    ],
)
def test_files_that_do_not_belong_together_are_one_sentence(paths: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        select(paths, FIELD, "s3://b/rows")
    assert str(caught.value).startswith(f"{FIELD}: {sentence}")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    folder = tmp_path / "volumes" / "claim"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(volumes=tmp_path / "volumes", scratch=tmp_path / "scratch")


def no_store() -> Store:
    return Store("http://127.0.0.1:9", "us-east-1", None)


def on_volume(path: str) -> DataSource:
    return DataSource.model_validate({"volume": {"claimName": "claim", "path": path}})


def places(source: DataSource, paths: Paths, folder: Path) -> list[str]:
    """Return the place of each row of ``source``, for example `claim/rows/a.txt line 1`."""
    local = data_file(source, "dataset.train", paths, no_store(), folder)
    return [row.place(source_name(source)) for row in read_rows(local, "dataset.train")]


@pytest.mark.parametrize("path", ["rows", "rows/", "./rows", "rows/*.txt", "rows/**/*.txt", "rows/../rows/*"])
def test_a_folder_or_a_glob_on_a_volume_is_read_in_order(path: str, volume: Path, paths: Paths, tmp_path: Path) -> None:
    rows = volume / "rows"
    rows.mkdir()
    for name in ("b.txt", "a.txt", "_SUCCESS", ".a.txt.crc"):
        (rows / name).write_text("one\n")
    expected = ["claim/rows/a.txt line 1", "claim/rows/b.txt line 1"]
    found = places(on_volume(path), paths, tmp_path / "rows")
    assert [place.replace("rows/../", "") for place in found] == expected


def test_a_name_with_wildcards_is_a_file_where_it_exists(volume: Path, paths: Paths, tmp_path: Path) -> None:
    (volume / "a[1].txt").write_text("one\n")
    (volume / "a1.txt").write_text("two\n")
    assert places(on_volume("a[1].txt"), paths, tmp_path / "rows") == ["claim/a[1].txt line 1"]
    assert places(on_volume("a[12].txt"), paths, tmp_path / "more") == ["claim/a1.txt line 1"]


def test_links_are_followed_within_the_volume_only(volume: Path, paths: Paths, tmp_path: Path) -> None:
    (volume / "real").mkdir()
    (volume / "real" / "a.txt").write_text("one\n")
    rows = volume / "rows"
    rows.mkdir()
    (rows / "folder").symlink_to("../real")
    (rows / "circle").symlink_to("../rows")
    assert places(on_volume("rows"), paths, tmp_path / "1") == ["claim/rows/folder/a.txt line 1"]
    (rows / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"claim/rows/gone\.txt is a link to a file that does not exist"):
        places(on_volume("rows"), paths, tmp_path / "2")
    (rows / "gone.txt").unlink()
    (tmp_path / "secret.txt").write_text("secret")
    (rows / "out.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"^dataset.train.volume.path: must not lead out of the volume$"):
        places(on_volume("rows"), paths, tmp_path / "3")


def test_special_files_are_not_read(volume: Path, paths: Paths, tmp_path: Path) -> None:
    os.mkfifo(volume / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(volume / "s.txt"))
        with pytest.raises(UserError, match="there is no data file at claim/"):
            places(on_volume("."), paths, tmp_path / "rows")
        with pytest.raises(UserError, match=r"there is no 'pipe\.txt' in volume 'claim'"):
            places(on_volume("pipe.txt"), paths, tmp_path / "more")


def test_what_the_pod_may_not_read_is_an_outside_failure(
    volume: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "rows").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    sentence = rf"the pod's user {os.getuid()} may not read 'rows' in volume 'claim'"
    with pytest.raises(OutsideFailure, match=sentence):
        VolumeDataFiles(on_volume("rows").volume, "dataset.train", paths)  # type: ignore[arg-type]


@given(st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & {0, ord("/")}))
def test_any_bytes_as_a_name_on_a_volume_are_read_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: bytes
) -> None:
    base = tmp_path_factory.mktemp("volumes")
    folder = base / "claim" / "rows"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(name + b".txt")).write_bytes(b"one\n")
    try:
        found = places(on_volume("rows"), Paths(volumes=base), base / "rows")
    except UserError:
        found = []
    assert all(place.encode() for place in found)
    assert len(found) == (not name.startswith((b".", b"_")))


PART = st.sampled_from(["a", "b", "_a", ".b", "[a]", "a*", "c d"])
GLOB_PART = st.sampled_from(["a", "*", "**", "_*", ".*", "?", "[ab]", "_a", "[a]", "a*", "[[]a]", "*a", "b**"])


@given(
    st.lists(st.lists(PART, max_size=3), max_size=6),
    st.lists(GLOB_PART, min_size=1, max_size=4),
    st.sampled_from(["", "/*.txt", "/x.txt"]),
)
@example([["_a"], ["a", "_a", "b"]], ["*", "_*", "**"], "")
@example([["[a]"], ["a"]], ["[a]"], "")
def test_a_path_names_the_same_files_on_a_volume_and_in_a_bucket(
    tmp_path_factory: pytest.TempPathFactory, folders: list[list[str]], parts: list[str], end: str
) -> None:
    base, glob = tmp_path_factory.mktemp("same"), "/".join(parts) + end
    files = {"/".join((*folder, "x.txt")): b"one" for folder in folders}
    for name in files:
        file = base / "volumes" / "claim" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"one")
    (base / "volumes" / "claim").mkdir(parents=True, exist_ok=True)
    bucket: Any = Bucket(files)
    if " " in glob or PurePosixPath(glob).as_posix() != glob:
        return
    sources = {
        "claim/": {"volume": {"claimName": "claim", "path": glob}},
        "s3://bucket/": {"s3": {"uri": f"s3://bucket/{glob}"}},
    }
    found: list[object] = []
    for start, source in sources.items():
        try:
            chosen_files = find_data_files(
                DataSource.model_validate(source), "dataset.train", Paths(volumes=base / "volumes"), bucket, base
            )
            found.append([file.path for file in chosen_files.files])
        except UserError as error:
            kind = "malformed" if "malformed" in error.problem else "there is no"
            assert kind in error.problem, start  # noqa: PT017
            found.append(kind)
    assert found[0] == found[1]


def test_what_a_glob_does_not_name_is_not_in_its_way(volume: Path, paths: Paths, tmp_path: Path) -> None:
    (volume / "rows").mkdir()
    (volume / "rows" / "a.txt").write_text("one\n")
    (volume / "rows" / "gone.md").symlink_to("nowhere")
    (volume / "models" / "gone").mkdir(parents=True)
    (volume / "models" / "gone" / "link").symlink_to("nowhere")
    (volume / "models" / "out").symlink_to(tmp_path)
    for number, glob in enumerate(("r*/*.txt", "rows/*.txt", "*/a.txt", "**/a.[!m]*")):
        if glob.startswith("**"):
            # This glob names files in all folders, so links that lead nowhere or out of the volume would be refused.
            for link in ("models/gone/link", "models/out", "rows/gone.md"):
                (volume / link).unlink()
        found = places(on_volume(glob), paths, tmp_path / f"rows-{number}")
        assert found == ["claim/rows/a.txt line 1"]
    (volume / "rows" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"claim/rows/gone\.txt is a link to a file that does not exist"):
        places(on_volume("rows/*.txt"), paths, tmp_path / "more")


def test_a_folder_that_the_pod_may_not_read_is_not_in_the_way_of_a_glob(
    volume: Path, monkeypatch: pytest.MonkeyPatch, paths: Paths, tmp_path: Path
) -> None:
    (volume / "private").mkdir()
    (volume / "a.txt").write_text("one\n")
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if folder.name == "private":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("finetune_trainer.sources.volumes.os.scandir", refuse)
    assert places(on_volume("*.txt"), paths, tmp_path / "rows") == ["claim/a.txt line 1"]
    with pytest.raises(OutsideFailure, match="may not read 'private'"):
        places(on_volume("."), paths, tmp_path / "more")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("rows/*.csv", "there is no data file at s3://b/p; near it lie rows/A.TXT, rows/_b.txt, rows/sub/c.txt"),
        ("rows/*.csv", " (names that begin with `.` or `_` are left out unless the glob names them so)"),
        ("_x", "there is no data file at s3://b/p"),
        ("only", "there is no data file at s3://b/p; near it lie only/_a.txt (names that begin with"),
        ("md", "there is no data file at s3://b/p; it holds md/a.md: the suffix must be .jsonl"),
    ],
)
def test_where_nothing_is_found_the_sentence_says_what_lies_near(path: str, sentence: str) -> None:
    listed = ["rows/A.TXT", "rows/_b.txt", "rows/sub/c.txt", "only/_a.txt", "md/a.md"]
    with pytest.raises(UserError) as caught:
        chosen(listed, path, FIELD, "s3://b/p")
    assert sentence in str(caught.value)


def test_odd_names_are_shown_on_one_line_and_as_valid_text(
    volume: Path, paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (b"\xe4.txt", "ä ü.txt".encode(), b"a\nb.txt", b"\x1b[2J\xff.md"):
        (volume / os.fsdecode(name)).write_text("one\n")
    folder = data_file(on_volume("."), "dataset.train", paths, no_store(), tmp_path / "rows")
    assert [file.name for file in read_index(folder)] == ["claim/a\\nb.txt", "claim/ä ü.txt", "claim/\\udce4.txt"]
    assert len(list(read_rows(folder, "dataset.train"))) == 3
    notice = "a file that is no data file is left out of claim/.: \\x1b[2J\\udcff.md"
    assert capsys.readouterr().out == f"dataset.train.volume.path: {notice}\n"


class Bucket:
    """The part of `Store` that finds and reads data files, with objects in memory."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def stat(self, _bucket: str, key: str) -> ListedObject | None:
        return self._entry(key) if key in self.objects else None

    def list_objects(self, _bucket: str, prefix: str, *, most: int) -> list[ListedObject]:
        return [self._entry(key) for key in sorted(self.objects) if key.startswith(prefix)][:most]

    def download(self, _bucket: str, key: str, path: Path) -> object:
        return path.write_bytes(self.objects[key])

    def _entry(self, key: str) -> ListedObject:
        return ListedObject(key, len(self.objects[key]), NOW, f"etag of {key}")


def in_bucket(uri: str, objects: dict[str, bytes], folder: Path) -> list[str]:
    """Return the place of each row of the source ``uri``, where the bucket has ``objects``."""
    source: Any = DataSource.model_validate({"s3": {"uri": uri}})
    bucket: Any = Bucket(objects)
    local = data_file(source, "dataset.train", Paths(), bucket, folder)
    return [row.place(source_name(source)) for row in read_rows(local, "dataset.train")]


def test_an_address_names_an_object_a_folder_or_a_glob(tmp_path: Path) -> None:
    objects = {
        "rows/": b"",
        "rows/b.txt": b"one",
        "rows/a.txt": b"one",
        "rows/_SUCCESS": b"",
        "rows/deep/c.txt": b"one",
        "rows-2/d.txt": b"one",
        "r[1].txt": b"one",
        "folder": b"",
        "folder/e.txt": b"one",
    }

    def found(uri: str) -> list[str]:
        return in_bucket(uri, objects, tmp_path / str(len(list(tmp_path.iterdir()))))

    below_rows = [f"s3://bucket/rows/{name} line 1" for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert found("s3://bucket/rows") == found("s3://bucket/rows/") == below_rows
    assert found("s3://bucket/rows/*.txt") == below_rows[:2]
    assert found("s3://bucket/rows*/**/*.txt") == ["s3://bucket/rows-2/d.txt line 1", *below_rows]
    assert found("s3://bucket/r[1].txt") == ["s3://bucket/r[1].txt line 1"]
    assert found("s3://bucket/folder") == ["s3://bucket/folder/e.txt line 1"]
    for uri in ("s3://bucket/row", "s3://bucket/rows/c*"):
        with pytest.raises(UserError, match=r"^dataset.train.s3.uri: there is no "):
            found(uri)


@given(st.lists(st.text(max_size=12), max_size=4))
@example(["rows/../../../etc/x.txt", "rows//a.txt", "rows/./b.txt", "rows/\x00.txt", "rows/" + "x" * 300 + ".txt"])
def test_any_key_of_a_bucket_is_read_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, keys: list[str]) -> None:
    folder = tmp_path_factory.mktemp("data") / "train"
    try:
        found = in_bucket("s3://bucket/rows", {f"rows/{key}.txt": b"one" for key in keys}, folder)
    except UserError:
        found = []
    assert all(place.endswith(".txt line 1") for place in found)
    if folder.is_dir():
        assert all(file.parent == folder for file in folder.rglob("*"))


@given(st.binary(max_size=30).map(lambda data: data.decode("latin-1")))
@example("a/../b")
@example(".")
def test_any_key_is_an_answer_or_an_outside_failure(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    keys = tmp_path_factory.mktemp("keys")
    write_credentials(keys, "key", "secret")
    client = Store("http://127.0.0.1:9", "us-east-1", keys, budget_seconds=0)
    with pytest.raises(OutsideFailure):
        client.read("bucket", key)


@pytest.mark.parametrize(
    ("card", "subset", "found"),
    [
        ("---\nconfigs:\n- data_files: '*.jsonl'\n---\n", None, ["train.jsonl"]),
        ("\ufeff---\nconfigs:\n- data_files: '*.jsonl'\n---\n", None, ["train.jsonl"]),
        ("---\r\nconfigs:\r\n- data_files: '*.jsonl'\r\n---\r\n", None, ["train.jsonl"]),
        (
            "---\nconfigs:\n- data_files: '**/train.jsonl'\n---\n",
            None,
            ["archive/old/train.jsonl", "archive/train.jsonl", "train.jsonl"],
        ),
        ("---\nconfigs:\n- data_files: {train: [train.jsonl], test: x}\n---\n", None, ["train.jsonl"]),
        (
            "---\nconfigs:\n- {data_dir: archive, data_files: '*.jsonl'}\n---\n",
            None,
            ["archive/test.jsonl", "archive/train.jsonl"],
        ),
        ("---\nconfigs:\n- {data_dir: archive/old}\n---\n", None, ["archive/old/train.jsonl"]),
        (
            "---\nconfigs:\n- {config_name: a, data_files: x}\n"
            "- {config_name: b, default: true, data_files: train.jsonl}\n---\n",
            None,
            ["train.jsonl"],
        ),
    ],
)
def test_the_files_of_a_data_card_are_those_of_the_hubs_viewer(card: str, subset: str | None, found: list[str]) -> None:
    assert split_files(FILES, card_configs(card), subset=subset, split="train", field="f") == found


def test_files_whose_names_tell_no_split_are_training_rows() -> None:
    files = ["README.md", "rows/a.json", "dataset_infos.json"]
    assert split_files(files, {}, subset=None, split="train", field="f") == ["rows/a.json"]
    for others in (["a.json", "test.json"], ["a.json"]):
        with pytest.raises(UserError, match=r"^f.split: no data file is called after"):
            split_files(others, {}, subset=None, split="train" if len(others) > 1 else "test", field="f")


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        (["training.csv", "valid.csv"], "train", ["training.csv"]),
        (["training.csv", "valid.csv"], "validation", ["valid.csv"]),
        (["train.csv", "dev.csv", "val-1.csv"], "validation", ["dev.csv", "val-1.csv"]),
        (["train.csv", "test.csv", "eval.csv"], "test", ["test.csv"]),
        (["train.csv", "test.csv", "eval.csv"], "eval", ["eval.csv"]),
        (["TRAIN.csv", "TEST.csv"], "train", ["TEST.csv", "TRAIN.csv"]),
    ],
)
def test_files_are_found_by_every_spelling_of_their_split(files: list[str], split: str, found: list[str]) -> None:
    assert split_files(files, {}, subset=None, split=split, field="f") == found


@pytest.mark.parametrize("files", ["5", "[{split: train}]", "[{split: train, path: [1]}]", "[null]", "{train: {a: b}}"])
def test_a_card_that_can_not_be_understood_is_one_sentence(files: str) -> None:
    configs = card_configs(f"---\nconfigs:\n- data_files: {files}\n---\n")
    with pytest.raises(UserError, match=r"^f: the data card names the files in a form that is not known"):
        split_files(FILES, configs, subset=None, split="train", field="f")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CONFIG = st.fixed_dictionaries({}, optional=dict.fromkeys(("config_name", "data_files", "data_dir", "default"), JSON))


@given(JSON | st.lists(CONFIG | JSON, max_size=3), st.lists(st.text(max_size=10), max_size=4))
def test_any_data_card_names_files_or_is_a_sentence(configs: Any, files: list[str]) -> None:
    import yaml

    card = f"---\n{yaml.safe_dump({'configs': configs})}\n---\n"
    try:
        found = split_files(files, card_configs(card), subset=None, split="train", field="f")
    except UserError:
        found = []
    assert set(found) <= set(files)


@given(st.text())
def test_any_text_as_a_data_card_is_no_crash(card: str) -> None:
    card_configs(card)
    card_configs(f"---\n{card}\n---\n")


SIBLING = st.fixed_dictionaries(
    {}, optional={"rfilename": JSON, "size": JSON, "blobId": JSON, "lfs": JSON, "another": JSON}
)
ANSWERS = st.fixed_dictionaries(
    {}, optional={"id": JSON, "sha": JSON, "siblings": st.lists(SIBLING | JSON, max_size=3) | JSON, "tags": JSON}
)


class AnyHub(Hub):
    """A hub that answers every request with the JSON value `document`."""

    document: object = None

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(self.document).encode()


def test_any_answer_of_the_hub_names_files_or_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceDataSource(repo="acme/rows", path=".")
    outcomes: Counter[str] = Counter()
    with served(AnyHub("acme/rows", {})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)

        @given(ANSWERS | JSON)
        @example({"id": "acme/rows", "sha": "0", "siblings": [{"rfilename": "a.txt", "size": "many"}]})
        @example({"id": "acme/rows", "sha": "0", "siblings": [{"rfilename": "../a.txt"}]})
        @example({"id": "acme/rows", "sha": "0", "siblings": [{"rfilename": "a.txt", "size": 3}]})
        @settings(max_examples=60)
        def ask(document: object) -> None:
            hub.document = document  # type: ignore[attr-defined]
            try:
                found = HubDataFiles(source, "dataset.train", None, tmp_path / "train").files
                outcomes["files"] += all(isinstance(file.bytes, int) for file in found)
            except (UserError, OutsideFailure) as error:
                outcomes[type(error).__name__] += 1

        ask()
    assert outcomes["files"] >= 1
    assert outcomes["OutsideFailure"] >= 2


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"two words", b"two\nlines", "tök".encode()])
def test_a_secret_that_holds_no_token_is_an_outside_failure(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(data)
    with pytest.raises(OutsideFailure, match=r"^f: the key of the Secret must hold a token"):
        read_token(tmp_path / "token", "f")


def test_a_byte_order_mark_and_a_line_break_are_no_part_of_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfhf_secret\r\n")
    assert read_token(tmp_path / "token", "f") == "hf_secret"


@pytest.mark.parametrize("error", [KeyError("siblings"), TypeError("None"), ValueError("x"), RecursionError()])
def test_whatever_the_hubs_client_raises_is_an_outside_failure(error: Exception) -> None:
    def request() -> None:
        raise error

    with pytest.raises(OutsideFailure, match=r"^f: the hub's answer about a/b can't be read \("):
        call_hub(request, field="f", repo="a/b", revision="main", has_token=False)


def test_lack_of_memory_is_never_an_answer(paths: Paths) -> None:
    def request() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        call_hub(request, field="f", repo="a/b", revision="main", has_token=False)


def test_a_source_must_name_a_place(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be one of huggingFace, s3, volume"):
        find_data_files(DataSource(), "dataset.train", paths, no_store(), tmp_path)


def test_the_identity_of_the_data_follows_from_every_file_of_every_source(
    volume: Path, paths: Paths, tmp_path: Path
) -> None:
    (volume / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (volume / "model" / name).write_bytes(b"{}")
    for name in ("a.txt", "b.txt", "c/d.txt"):
        (volume / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (volume / "rows" / name).write_text(name)
    manifest = quickstart("model", {"volume": {"claimName": "claim", "path": "model"}})
    mix = [on_volume("rows/*.txt").to_json(), on_volume("rows/c").to_json()]
    manifest["spec"]["dataset"] |= {"train": {"mix": mix}, "validation": on_volume("rows").to_json()}
    config = resolve(FineTuneJob.model_validate(manifest), report=None)

    def identities() -> dict[str, str]:
        return input_identities(config, paths, no_store(), tmp_path / "identities")

    def changed(before: dict[str, str]) -> set[str]:
        after = identities()
        assert after.keys() == before.keys() == {"dataset.train", "dataset.validation", "model"}
        return {name for name in after if after[name] != before[name]}

    first = identities()
    assert changed(first) == set()
    (volume / "rows" / "c" / "d.txt").write_text("e")
    assert changed(first) == {"dataset.train", "dataset.validation"}
    second = identities()
    (volume / "rows" / "c" / "_SUCCESS").write_text("")
    assert changed(second) == set()
    (volume / "rows" / "new.txt").write_text("new")
    assert changed(second) == {"dataset.train", "dataset.validation"}


def test_odd_keys_of_a_real_bucket_are_read_in_order(store: ObjectStore, tmp_path: Path) -> None:
    names = ["a b+%25 ä.txt", "e\u0301 🙂 #?&.txt", "~()'!,;=.txt", "back\\slash.txt", "[x]*.txt", "%2e%2e.txt"]
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{name}\n")
    store.upload("odd", folder)
    opened = Store(store.endpoint, "us-east-1", store.credentials)
    for number, uri in enumerate((f"s3://{BUCKET}/odd", f"s3://{BUCKET}/odd/*.txt")):
        source = DataSource.model_validate({"s3": {"uri": uri}})
        local = data_file(source, "dataset.train", Paths(), opened, tmp_path / str(number))
        rows = list(read_rows(local, "dataset.train"))
        assert [row.fields["text"] for row in rows] == sorted(names)
        assert [row.place(uri) for row in rows] == [f"s3://{BUCKET}/odd/{name} line 1" for name in sorted(names)]
