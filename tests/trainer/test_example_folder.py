"""Prepared examples are put into a folder of the node, and kept on a volume under their identity. Whatever is damaged,
or comes from somebody who does not know the key, is made again and never believed. Several writers do not harm each
other."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_trainer.data.dataset import length_limit
from finetune_trainer.data.files.index import DataFile, write_index
from finetune_trainer.data.prepared.chunk_workers import ChunkWorkers, SignOfLife
from finetune_trainer.data.prepared.example_cache import FOLDER, ExampleCache
from finetune_trainer.data.prepared.example_folder import FILES, Obtained, load_examples, obtain_examples
from finetune_trainer.data.prepared.prepared_rows import PreparedRows, prepare_rows
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, tokenize_functions
from finetune_trainer.pod.errors import OutsideFailure
from tests.trainer import tiny
from tests.trainer.prepared import FIELD, dataset_of, write_tokenizer

KEY = b"a secret of the job"
IDENTITY = "a" * 64
DATASET = dataset_of(tiny.PROMPT_COMPLETION, badRows="Skip")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedRows:
    """Examples of two files, of which one row is bad."""
    folder = tmp_path_factory.mktemp("made")
    files = [tiny.write_jsonl(folder / f"{n}.jsonl", [*tiny.rows(9, seed=n), {"question": "w1"}]) for n in (1, 2)]
    write_index(folder, [DataFile(path, path.name, f"s3://bucket/{path.name}") for path in files])
    tokenize = tokenize_functions(load_tokenizer(write_tokenizer(folder)))
    limit = length_limit(DATASET, None)
    return prepare_rows(read_rows(folder, FIELD), "rows", FIELD, DATASET, tokenize, limit=limit, keep_rows=True)


def values(prepared: PreparedRows) -> object:
    """Return everything that a folder keeps, in a form that can be compared."""
    origins = prepared.origins
    examples = prepared.examples
    return (
        (examples.digest, examples.digest_with_rows, list(examples.rows), prepared.notices, prepared.rows),
        (list(origins.files), list(origins.file), list(origins.number)),
    )


class Making:
    """Returns the examples, and counts how often it was asked."""

    def __init__(self, made: PreparedRows) -> None:
        self.made, self.count, self._lock = made, 0, threading.Lock()

    def __call__(self) -> PreparedRows:
        with self._lock:
            self.count += 1
        return self.made


def obtained(make: Making, target: Path, cache: Path | None, key: bytes = KEY, identity: str = IDENTITY) -> Obtained:
    """Obtain the examples, and check that they are the right ones and that nothing unfinished is left behind."""
    found = obtain_examples(identity, make, target, cache=cache, key=key)
    assert values(found.prepared) == values(make.made)
    assert not list(target.parent.glob(".unfinished-*"))
    assert cache is None or not list(cache.glob(f"{FOLDER}/unfinished-*"))
    return found


def volume(folder: Path) -> Path:
    """Return the folder at which a volume is mounted."""
    (folder / "cache").mkdir(exist_ok=True)
    return folder / "cache"


def test_examples_are_made_once(made: PreparedRows, tmp_path: Path) -> None:
    make, cache = Making(made), volume(tmp_path)
    assert made.notices
    assert not obtained(make, tmp_path / "node-1" / "train", cache).from_cache
    assert obtained(make, tmp_path / "node-1" / "train", cache).from_cache
    assert obtained(make, tmp_path / "node-2" / "train", cache).from_cache
    assert make.count == 1


def test_without_a_cache_or_an_identity_examples_are_made_each_time(made: PreparedRows, tmp_path: Path) -> None:
    make = Making(made)
    for number in (1, 2):
        assert not obtained(make, tmp_path / "train", None).from_cache
        assert not obtain_examples(None, make, tmp_path / "train", cache=volume(tmp_path)).from_cache
        assert make.count == 2 * number


def test_an_example_knows_its_row(made: PreparedRows, tmp_path: Path) -> None:
    origins = obtained(Making(made), tmp_path / "train", None).prepared.origins
    assert list(origins.files) == ["s3://bucket/1.jsonl", "s3://bucket/2.jsonl"]
    places = list(zip(origins.file.tolist(), origins.number.tolist(), strict=True))
    assert places == [(file, number) for file in (0, 1) for number in range(1, 10)]


def test_all_ranks_of_a_node_map_the_same_file(made: PreparedRows, tmp_path: Path) -> None:
    target = tmp_path / "train"
    obtained(Making(made), target, None)

    def rank(_: int, alive: SignOfLife) -> tuple[str, list[bool], bool]:
        examples = load_examples(target).examples
        arrays = list(examples._arrays.values())
        mapped = Path("/proc/self/maps").read_text()
        return examples.digest, [array.flags.writeable for array in arrays], str(target / "ids.npy") in mapped

    with ChunkWorkers[int, tuple[str, list[bool], bool]](3, rank) as workers:
        found = [result for _, result in workers.results(range(3), lambda number: number)]
    assert found == [(made.examples.digest, [False] * 4, True)] * 3
    assert isinstance(load_examples(target).examples._arrays["ids"], np.memmap)


def kept_file(cache: Path, key: bytes = KEY, identity: str = IDENTITY) -> Path:
    """Return the file with the examples on the volume."""
    with ExampleCache(cache, key) as opened:
        return cache / FOLDER / opened.name(identity)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def link(path: Path, place: int) -> None:
    other = path.parent.parent / f"other-{path.name}"
    path.rename(other)
    path.symlink_to(other)


def make_folder(path: Path, place: int) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path, place: int) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "changed": flip,
    "cut off": lambda path, place: os.truncate(path, place % path.stat().st_size),
    "longer": lambda path, place: path.write_bytes(path.read_bytes() + bytes(1 + place % 9)),
    "emptied": lambda path, place: path.write_bytes(b""),
}
ABSENCES: dict[str, Callable[[Path, int], object]] = {
    "deleted": lambda path, place: path.unlink(),
    "a link": link,
    "a pipe": make_pipe,
}


@settings(max_examples=60)
@given(st.sampled_from(sorted(DAMAGES | ABSENCES)), st.integers(0, 1 << 20))
def test_damaged_examples_are_made_again(
    made: PreparedRows, tmp_path_factory: pytest.TempPathFactory, damage: str, place: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    make, cache = Making(made), volume(folder)
    obtained(make, folder / "train", cache)
    (DAMAGES | ABSENCES)[damage](kept_file(cache), place)
    again = obtained(make, folder / "train", cache)
    assert make.count == 2
    assert not again.from_cache
    assert bool(again.trouble) is (damage in DAMAGES)
    assert obtained(make, folder / "train", cache).from_cache
    assert make.count == 2
    shutil.rmtree(folder)


def test_a_folder_in_the_place_of_the_examples_is_no_error(made: PreparedRows, tmp_path: Path) -> None:
    cache, make = volume(tmp_path), Making(made)
    obtained(make, tmp_path / "train", cache)
    make_folder(kept_file(cache), 0)
    found = obtained(make, tmp_path / "train", cache)
    assert not found.from_cache
    assert found.trouble == (
        f"the volume at {cache} can't be written to ({os.strerror(errno.EISDIR)}): the examples are not kept"
    )


NAME = f"examples-{hmac.digest(KEY, f'name {IDENTITY}'.encode(), 'sha256').hex()}"
"""Name of the file with the examples on the volume."""
SEALS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 1 << 70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=80)
@given(
    st.one_of(SEALS, st.fixed_dictionaries({"name": st.just(NAME), "salt": SEALS, "files": SEALS})),
    st.dictionaries(st.sampled_from(FILES), st.lists(SEALS, max_size=2), min_size=1),
    st.booleans(),
)
@example({}, {}, False)
@example({"files": {name: [0, ""] for name in FILES}}, {}, False)
@example({"name": NAME, "salt": "\ud800", "files": {name: [0, ""] for name in FILES}}, {}, False)
@example({"name": NAME, "salt": "", "files": {name: [-5, ""] for name in FILES}}, {}, False)
@example({"name": NAME, "salt": "", "files": {name: [math.inf, ""] for name in FILES}}, {}, False)
def test_any_seal_of_somebody_with_the_key_is_read_without_a_crash(
    made: PreparedRows, tmp_path_factory: pytest.TempPathFactory, sealed: Any, changed: dict[str, Any], of_ours: bool
) -> None:
    folder = tmp_path_factory.mktemp("seals")
    make, cache = Making(made), volume(folder)
    obtained(make, folder / "train", cache)
    line, _, rest = kept_file(cache).read_bytes().partition(b"\n")
    content = json.loads(json.loads(line)["content"])
    if of_ours:
        content["files"] |= changed
    else:
        content = sealed
    text = json.dumps(content)
    seal = json.dumps({"content": text, "mac": hmac.digest(KEY, text.encode(), "sha256").hex()})
    kept_file(cache).write_bytes(seal.encode() + b"\n" + rest)
    found = obtained(make, folder / "train", cache)
    assert not found.from_cache
    assert found.trouble.endswith(": they are made again")
    shutil.rmtree(folder)


def test_the_sentences_about_damage_say_what_is_damaged(made: PreparedRows, tmp_path: Path) -> None:
    cache = volume(tmp_path)
    kept = kept_file(cache)

    def trouble(spoil: Callable[[], object]) -> str:
        obtained(Making(made), tmp_path / "train", cache)
        spoil()
        return obtained(Making(made), tmp_path / "train", cache).trouble

    begin, again = f"the examples {IDENTITY} on the volume at {cache}", "they are made again"
    obtained(Making(made), tmp_path / "train", cache)
    first_file = kept.read_bytes().index(b"\n") + 200
    assert trouble(lambda: flip(kept, first_file)) == f"{begin} have a changed ids.npy: {again}"
    assert trouble(lambda: os.truncate(kept, first_file)) == f"{begin} have another size: {again}"
    sealed_by_others = json.dumps({"content": "{}", "mac": "0"}).encode() + b"\n"
    assert trouble(lambda: kept.write_bytes(sealed_by_others)) == f"{begin} have another seal: {again}"
    assert "have a seal that can't be read" in trouble(lambda: kept.write_bytes(b"\n"))


def test_jobs_with_different_keys_keep_their_examples_beside_each_other(made: PreparedRows, tmp_path: Path) -> None:
    make, cache, keys = Making(made), volume(tmp_path), (b"one job", b"another job", b"")
    for key in keys:
        assert not obtained(make, tmp_path / "train", cache, key).from_cache
    for key in keys:
        assert obtained(make, tmp_path / "train", cache, key).from_cache
    assert make.count == len(keys)


def test_examples_of_somebody_without_the_key_are_not_believed(made: PreparedRows, tmp_path: Path) -> None:
    make, cache = Making(made), volume(tmp_path)
    obtained(make, tmp_path / "train", cache, b"a foreign key")
    kept_file(cache, b"a foreign key").rename(kept_file(cache))
    found = obtained(make, tmp_path / "train", cache)
    assert not found.from_cache
    assert "have another seal" in found.trouble
    assert make.count == 2


def test_examples_under_the_name_of_others_are_not_believed(made: PreparedRows, tmp_path: Path) -> None:
    make, cache, other = Making(made), volume(tmp_path), "b" * 64
    obtained(make, tmp_path / "train", cache)
    kept_file(cache).rename(kept_file(cache, identity=other))
    found = obtained(make, tmp_path / "train", cache, identity=other)
    assert not found.from_cache
    assert "have the seal of other examples" in found.trouble


def test_several_writers_do_not_harm_each_other(made: PreparedRows, tmp_path: Path) -> None:
    writers, cache = 6, volume(tmp_path)
    barrier, make = threading.Barrier(writers), Making(made)

    def at_once() -> PreparedRows:
        barrier.wait(60)
        return make()

    def write(number: int) -> object:
        return values(obtain_examples(IDENTITY, at_once, tmp_path / f"{number}" / "train", cache=cache).prepared)

    with ThreadPoolExecutor(writers) as pool:
        found = list(pool.map(write, range(writers)))
    assert found == [values(made)] * writers
    assert make.count == writers
    assert list((cache / FOLDER).iterdir()) == [kept_file(cache, b"")]
    assert obtained(make, tmp_path / "again", cache, b"").from_cache


def test_a_volume_that_can_not_be_used_is_no_error(made: PreparedRows, tmp_path: Path) -> None:
    cache = volume(tmp_path)
    (cache / FOLDER).write_text("a file, and no folder")
    found = obtained(Making(made), tmp_path / "train", cache)
    assert found.trouble == f"the volume at {cache} can't be used (File exists): the examples are not kept"


def test_a_volume_that_can_not_be_looked_at_is_no_error(made: PreparedRows, tmp_path: Path) -> None:
    mount = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
        mount.is_dir()
    found = obtain_examples(IDENTITY, Making(made), tmp_path / "train", cache=mount, key=KEY)
    assert values(found.prepared) == values(made)
    reason = os.strerror(errno.ENAMETOOLONG)
    assert found.trouble == f"the volume at {mount} can't be used ({reason}): the examples are not kept"


def test_examples_of_data_that_changed_meanwhile_are_not_kept(made: PreparedRows, tmp_path: Path) -> None:
    cache, make = volume(tmp_path), Making(made)
    found = obtain_examples(
        IDENTITY, make, tmp_path / "train", cache=cache, key=KEY, is_unchanged=lambda: make.count == 0
    )
    assert values(found.prepared) == values(made)
    assert found.trouble == "the data changed while the examples were made: the examples are not kept"
    assert list((cache / FOLDER).iterdir()) == []


def test_other_users_of_the_volume_learn_nothing_of_the_examples(made: PreparedRows, tmp_path: Path) -> None:
    """Neither a value, nor whether two jobs have the same examples."""
    cache, make, texts = volume(tmp_path), Making(made), []
    rows = (b"question", b"s3://bucket/1.jsonl")
    for key in (b"one job", b"another job"):
        obtained(make, tmp_path / "train", cache, key)
        texts.append(kept_file(cache, key).read_bytes())
        texts.append(texts[-1].partition(b"\n")[2])
    contents = [(tmp_path / "train" / name).read_bytes() for name in FILES]
    local = b"".join(contents)
    assert all(row in local for row in rows)
    assert len(texts[1]) == len(texts[3]) == len(local)
    # Of random bytes, one in 256 is the same.
    for ones, others in ((texts[1], local), (texts[3], local), (texts[1], texts[3])):
        assert sum(one == other for one, other in zip(ones, others, strict=True)) < len(local) / 50
    for text in texts:
        assert IDENTITY.encode() not in text
        assert not [each for each in contents if hashlib.sha256(each).hexdigest().encode() in text]
    kept_file(cache, b"one job").unlink()
    obtained(make, tmp_path / "train", cache, b"one job")
    assert kept_file(cache, b"one job").read_bytes().partition(b"\n")[2] != texts[1], "no key is used twice"


def test_a_job_without_the_volume_has_no_trouble(made: PreparedRows, tmp_path: Path) -> None:
    assert obtained(Making(made), tmp_path / "train", tmp_path / "none") == Obtained(ANY, from_cache=False)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_node_that_can_not_be_written_is_an_outside_failure_that_names_the_node(
    is_kept: bool, made: PreparedRows, tmp_path: Path
) -> None:
    """It is found out before the examples are made, which may take hours."""
    cache, make = volume(tmp_path), Making(made)
    if is_kept:
        obtained(make, tmp_path / "train", cache)
    made_before = make.count
    (tmp_path / "node").write_text("a file, and no folder")
    with pytest.raises(OutsideFailure, match=f"the examples can't be written to {tmp_path}/node: ") as raised:
        obtain_examples(IDENTITY, make, tmp_path / "node" / "train", cache=cache, key=KEY)
    assert str(cache) not in str(raised.value)
    assert make.count == made_before
    assert not is_kept or obtained(make, tmp_path / "train", cache).from_cache


def test_a_node_that_can_not_be_read_is_an_outside_failure_that_names_the_node(
    made: PreparedRows, tmp_path: Path
) -> None:
    """The volume is not at fault, and the ranks could not map the examples either."""
    cache = volume(tmp_path)

    def spoil() -> bool:
        (tmp_path / "node" / "train" / FILES[-1]).unlink()
        return True

    sentence = f"the examples can't be read from {tmp_path}/node: {os.strerror(errno.ENOENT)}"
    with pytest.raises(OutsideFailure, match=sentence):
        obtain_examples(IDENTITY, Making(made), tmp_path / "node" / "train", cache=cache, key=KEY, is_unchanged=spoil)
    assert list((cache / FOLDER).iterdir()) == []


def test_a_node_without_room_while_examples_are_copied_is_an_outside_failure(
    made: PreparedRows, tmp_path: Path
) -> None:
    cache, make = volume(tmp_path), Making(made)
    obtained(make, tmp_path / "train", cache)
    sentence = f"the examples can't be written to {tmp_path}: {os.strerror(errno.EFBIG)}"
    with largest_file(600), pytest.raises(OutsideFailure, match=sentence):
        obtain_examples(IDENTITY, make, tmp_path / "train", cache=cache, key=KEY)
    assert make.count == 1
    assert obtained(make, tmp_path / "train", cache).from_cache


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process become larger than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_examples_that_do_not_fit_on_the_volume_displace_no_others(made: PreparedRows, tmp_path: Path) -> None:
    cache, make = volume(tmp_path), Making(made)
    obtained(make, tmp_path / "train", cache)
    error = pytest.raises(OSError, match=os.strerror(errno.EFBIG))
    with largest_file(600), ExampleCache(cache, KEY) as opened, error:
        opened.copy_in("b" * 64, FILES, tmp_path / "train")
    assert [file.name for file in (cache / FOLDER).iterdir()] == [kept_file(cache).name]


def test_the_notes_are_json(made: PreparedRows, tmp_path: Path) -> None:
    obtained(Making(made), tmp_path / "train", None)
    assert json.loads((tmp_path / "train" / "notes.json").read_text())["rows"] == 20
