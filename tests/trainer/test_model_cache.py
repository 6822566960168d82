"""The files of a model are fetched once for all pods that share a cache, or once for each job where the source states
no digests. Whatever the cache holds, no pod gets a file that is not the one in the source."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_core.api.sources import HuggingFaceSource
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.pod import volume_folder
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.settings import Paths
from finetune_trainer.pod.volume_folder import LEFTOVER_SECONDS
from finetune_trainer.sources.cache.cache_folder import FOLDER, ModelCache, Pace
from finetune_trainer.sources.cache.cached_fetch import SMALL_BYTES, cache_notices, fetch_model_files
from finetune_trainer.sources.content_digest import NAME, ContentDigest, Hasher, hub_digest, object_digest
from finetune_trainer.sources.inputs import fetch_inputs
from finetune_trainer.sources.model_files import HubFiles, model_files
from finetune_trainer.storage.client import EtagForm, Store
from finetune_trainer.storage.model_digests import ModelDigests
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.run_store import ObjectDigest
from tests.trainer.conftest import StartPods
from tests.trainer.fetching import FolderSource, NoDigests, start
from tests.trainer.hub import TOKEN, running_hub
from tests.trainer.objectstore import BUCKET, ObjectStore, running_store
from tests.trainer.pods import run_config
from tests.trainer.small_volume import mounted
from tests.trainer.storeproxy import StoreProxy, proxy_before

MIB = 1 << 20
QUICK = Pace(beat_seconds=0.02, dead_seconds=0.4, look_seconds=0.02)
"""The pace of the pods in these tests. It may be quick, because a local folder shows a change to all processes at once.
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the files of a model: two that are fetched together, and one that is fetched by itself."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("words")
    (folder / "model.safetensors").write_bytes(os.urandom(SMALL_BYTES + 1))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder at which the volume of the cache is mounted. The cache leaves only 64 MiB of the volume free, so that
    the tests also succeed where the disk of the machine is nearly full."""
    monkeypatch.setattr(volume_folder, "MOST_FREE_BYTES", 64 << 20)
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


class Pods:
    """Fetches a model into a new folder for each pod."""

    def __init__(self, source: Path, cache: Path, tmp_path: Path) -> None:
        self.source, self.cache, self.tmp_path = source, cache, tmp_path
        self.log = tmp_path / "fetched.log"
        self.folders: list[Path] = []

    def new_folder(self) -> Path:
        self.folders.append(self.tmp_path / f"pod-{len(self.folders)}")
        return self.folders[-1]

    def fetch(self) -> list[str]:
        """Fetch the model as one more pod, check the files, and return the names of the files that came from the
        source."""
        before = len(self.fetched())
        folder = self.new_folder()
        folder.mkdir()
        files = FolderSource(self.source, self.log)
        fetch_model_files(files, list(files.sizes), folder, self.cache, NoDigests(), QUICK)
        self.check(folder)
        return sorted(self.fetched()[before:])

    def start(self, *, pace: Pace = QUICK, die_at: int | None = None) -> Any:
        folder = self.new_folder()
        return start(self.source, self.log, folder, self.cache, pace, folder.with_suffix(".out"), die_at)

    def check(self, folder: Path) -> None:
        for path in self.source.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name

    def fetched(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def cached(self) -> dict[str, Path]:
        """Return, by the name of each file of the model, the path that the file has in the cache."""
        files = FolderSource(self.source, self.log)
        return {name: self.cache / FOLDER / digest_of(files, name).name for name in files.sizes}


def digest_of(files: FolderSource, name: str) -> ContentDigest:
    found = files.digest(name)
    assert found is not None
    return found


@pytest.fixture
def pod(source: Path, cache: Path, tmp_path: Path) -> Pods:
    return Pods(source, cache, tmp_path)


def test_the_second_pod_fetches_nothing(pod: Pods) -> None:
    assert pod.fetch() == ["config.json", "model.safetensors", "tokenizer.json"]
    assert pod.fetch() == []
    assert sorted(path.name for path in (pod.cache / FOLDER).iterdir()) == sorted(
        path.name for path in pod.cached().values()
    )


def test_a_file_that_another_model_has_too_is_not_fetched_again(pod: Pods) -> None:
    pod.fetch()
    (pod.source / "config.json").write_text('{"other": 1}')
    assert pod.fetch() == ["config.json"]


def test_without_a_cache_every_pod_fetches_everything(pod: Pods) -> None:
    pod.cache.rmdir()
    assert pod.fetch() == pod.fetch() == ["config.json", "model.safetensors", "tokenizer.json"]


def other_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link_to_a_secret(path: Path) -> None:
    secret = path.parents[2] / "secret"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WRONG: list[Callable[[Path], object]] = [
    other_bytes,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes() + b"x"),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    link_to_a_secret,
    named_pipe,
]


@pytest.mark.parametrize("spoil", WRONG, ids=["a bit", "empty", "longer", "shorter", "link", "pipe"])
def test_what_somebody_else_put_into_the_cache_is_noticed_and_replaced(
    spoil: Callable[[Path], object], pod: Pods
) -> None:
    pod.fetch()
    spoil(pod.cached()["model.safetensors"])
    assert pod.fetch() == ["model.safetensors"]
    spoilt = pod.cached()["model.safetensors"]
    assert not spoilt.is_symlink()
    assert spoilt.read_bytes() == (pod.source / "model.safetensors").read_bytes()
    assert pod.fetch() == []


def test_of_a_file_that_grows_while_it_is_read_no_more_is_copied_than_it_must_have(pod: Pods) -> None:
    class Growing(ContentDigest):
        """Lets the file grow when its copy begins, as another writer could."""

        def hasher(self) -> Hasher:
            with (pod.cache / FOLDER / self.name).open("ab") as file:
                file.write(bytes(MIB))
            return ContentDigest.hasher(self)

    pod.fetch()
    digest = digest_of(FolderSource(pod.source, pod.log), "model.safetensors")
    target = pod.tmp_path / "copy"
    with ModelCache(pod.cache) as opened:
        growing = Growing(algorithm=digest.algorithm, value=digest.value, bytes=digest.bytes)
        assert opened.copy_out(growing, target)
    assert target.read_bytes() == (pod.source / "model.safetensors").read_bytes()


def test_a_pod_keeps_its_files_whatever_happens_to_the_cache_later(pod: Pods) -> None:
    pod.fetch()
    pod.fetch()
    for path in pod.cached().values():
        path.write_bytes(b"other")
    for folder in pod.folders:
        pod.check(folder)


def test_a_folder_that_leads_elsewhere_is_not_written_to(pod: Pods, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = pod.tmp_path / "elsewhere"
    elsewhere.mkdir()
    (pod.cache / FOLDER).symlink_to(elsewhere)
    assert len(pod.fetch()) == 3
    assert list(elsewhere.iterdir()) == []
    assert "storage.cache: the volume can't be used (" in capsys.readouterr().out


def test_a_folder_in_the_place_of_a_file_costs_only_time(pod: Pods) -> None:
    pod.fetch()
    place = pod.cached()["model.safetensors"]
    place.unlink()
    (place / "deep").mkdir(parents=True)
    assert pod.fetch() == ["model.safetensors"]


def test_pods_that_start_at_once_fetch_each_file_once(pod: Pods) -> None:
    """Four processes race for the same files. Only the process that gets the turn fetches a file; the others wait."""
    patient = Pace(beat_seconds=0.1, dead_seconds=60, look_seconds=0.02)
    processes = [pod.start(pace=patient) for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert Counter(pod.fetched()) == Counter(["config.json", "model.safetensors", "tokenizer.json"])
    for folder in pod.folders:
        pod.check(folder)
    assert all(NAME.fullmatch(path.name) for path in (pod.cache / FOLDER).iterdir())


def test_a_pod_that_is_killed_at_any_moment_harms_no_other(pod: Pods) -> None:
    """For each event of `fetching.WATCHED`, such as the opening of a file, a process with an empty cache is killed
    before this event. Each file that the killed process leaves in the cache under the name of a digest is whole, and
    the next pod gets all files."""
    (pod.source / "model.safetensors").write_bytes(b"weights")
    whole = pod.start(pace=Pace(beat_seconds=60))
    whole.join(30)
    assert whole.exitcode == 0
    events = int(pod.folders[0].with_suffix(".events").read_text())
    assert events > 10
    for die_at in range(events):
        for path in (pod.cache / FOLDER).iterdir():
            path.unlink()
        killed = pod.start(pace=Pace(beat_seconds=60), die_at=die_at)
        killed.join(30)
        assert killed.exitcode == -signal.SIGKILL, die_at
        right = {path.name: name for name, path in pod.cached().items()}
        for path in (pod.cache / FOLDER).iterdir():
            if NAME.fullmatch(path.name):
                assert path.read_bytes() == (pod.source / right[path.name]).read_bytes(), die_at
        pod.fetch()
        assert pod.fetch() == [], die_at


@contextmanager
def in_turn(pod: Pods, names: list[str]) -> Iterator[ModelCache]:
    """While the block runs, hold the turn to fetch ``names``, with the signs of life of a pod."""
    files = FolderSource(pod.source, pod.log)
    turn_name = hashlib.sha256("\n".join(digest_of(files, name).name for name in names).encode()).hexdigest()
    with ModelCache(pod.cache, QUICK) as opened:
        turn = opened.take_turn(turn_name)
        assert turn is not None
        with turn:
            yield opened


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        # Pause between two checks; the deadline bounds their total time.
        time.sleep(0.02)


def test_a_pod_waits_for_the_one_that_fetches_and_takes_its_file(pod: Pods) -> None:
    with in_turn(pod, ["model.safetensors"]) as fetching:
        waiting = pod.start()
        output = pod.folders[0].with_suffix(".out")
        wait_until(lambda: output.exists() and "waits for another pod that fetches" in output.read_text())
        digest = digest_of(FolderSource(pod.source, pod.log), "model.safetensors")
        assert fetching.copy_in(digest, pod.source / "model.safetensors", [])
        waiting.join(30)
    assert waiting.exitcode == 0
    assert pod.fetched() == ["config.json", "tokenizer.json"]
    pod.check(pod.folders[0])


def test_a_pod_that_only_pretends_to_fetch_does_not_hold_others_up_for_ever(pod: Pods) -> None:
    """The process that holds the turn shows signs of life, but has held the turn longer than a download may take."""
    with in_turn(pod, ["model.safetensors"]):
        hurried = Pace(beat_seconds=0.02, dead_seconds=0.4, look_seconds=0.02, least_bytes_per_second=100 * MIB)
        waiting = pod.start(pace=hurried)
        waiting.join(30)
    assert waiting.exitcode == 0
    pod.check(pod.folders[0])


@pytest.fixture
def small_volume(cache: Path) -> Iterator[Path]:
    """A volume of 64 MiB."""
    with mounted(cache, "64m"):
        yield cache


def test_on_a_full_volume_the_models_that_were_not_used_for_longest_make_room(small_volume: Path, pod: Pods) -> None:
    (small_volume / "of-somebody-else").write_bytes(b"x" * MIB)
    weights = pod.source / "model.safetensors"
    contents = [os.urandom(20 * MIB) for _ in range(3)]
    for content in contents[:2]:
        weights.write_bytes(content)
        pod.fetch()
    weights.write_bytes(contents[0])
    assert pod.fetch() == [], "the first model is used again"
    weights.write_bytes(contents[2])
    assert pod.fetch() == ["model.safetensors"]
    weights.write_bytes(contents[0])
    assert pod.fetch() == [], "the first model is still there"
    weights.write_bytes(contents[1])
    assert pod.fetch() == ["model.safetensors"], "the second model made room"
    assert (small_volume / "of-somebody-else").exists()


def test_a_model_that_is_larger_than_the_volume_is_fetched_and_displaces_no_other(
    small_volume: Path, pod: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pod.fetch()
    weights = pod.source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(os.urandom(70 * MIB))
    assert pod.fetch() == pod.fetch() == ["model.safetensors"]
    sentence = "storage.cache: the volume can't be written to (No space left on device): what it lacks is not kept"
    assert sentence in capsys.readouterr().out
    weights.write_bytes(content)
    assert pod.fetch() == []


def test_a_disk_that_fills_up_while_a_file_is_written_leaves_no_half_of_it(small_volume: Path, pod: Pods) -> None:
    """The cache finds enough room for the file, but another writer fills this room before the file is written."""
    with ModelCache(small_volume) as opened:
        digest = digest_of(FolderSource(pod.source, pod.log), "model.safetensors")
        opened._files._make_room = lambda size, keep: (small_volume / "ballast").write_bytes(bytes(50 * MIB))  # type: ignore
        with pytest.raises(OSError, match="No space left on device"):
            opened.copy_in(digest, pod.source / "model.safetensors", [])
    assert list((small_volume / FOLDER).iterdir()) == []


def test_a_volume_that_can_only_be_read_still_serves_what_it_has(
    pod: Pods, small_volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pod.fetch()
    (pod.source / "config.json").write_text('{"new": 1}')
    subprocess.run(["mount", "-o", "remount,ro", str(small_volume)], check=True)
    assert pod.fetch() == ["config.json"]
    assert "storage.cache: the volume can't be written to (Read-only file system)" in capsys.readouterr().out
    assert cache_notices(1, small_volume) == [
        "storage.cache: user 0 of the pods can't write to the volume (Read-only file system), so pods fetch what it"
        " lacks and do not keep it"
    ]


def test_a_volume_that_can_not_be_looked_at_is_left_out(
    pod: Pods, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount, reason = tmp_path / ("x" * 300), os.strerror(errno.ENAMETOOLONG)
    with pytest.raises(OSError, match=reason):
        mount.is_dir()
    files = FolderSource(pod.source, pod.log)
    folder = pod.new_folder()
    folder.mkdir()
    fetch_model_files(files, list(files.sizes), folder, mount, NoDigests(), QUICK)
    pod.check(folder)
    assert capsys.readouterr().out == (
        f"storage.cache: the volume can't be used ({reason}): the model is fetched from its source\n"
    )
    assert cache_notices(1, mount) == [
        f"storage.cache: user {os.getuid()} of the pods can't write to the volume ({reason}), so pods fetch what it"
        " lacks and do not keep it"
    ]


def test_leftovers_of_pods_that_died_are_removed_after_a_day_and_not_before(pod: Pods) -> None:
    pod.fetch()
    folder = pod.cache / FOLDER
    old, young = folder / "unfinished-0", folder / "unfinished-1"
    for path in (old, young, folder / "0.turn"):
        path.write_bytes(b"half")
    ages = {old: LEFTOVER_SECONDS + 60, folder / "0.turn": LEFTOVER_SECONDS + 60, young: LEFTOVER_SECONDS - 3600}
    now = time.time()
    for path, age in ages.items():
        os.utime(path, (now - age, now - age))
    (pod.source / "config.json").write_text('{"new": 1}')
    pod.fetch()
    assert (old.exists(), (folder / "0.turn").exists(), young.exists()) == (False, False, True)


@pytest.mark.parametrize("volume_breaks", [False, True])
def test_bytes_that_are_not_what_the_source_states_are_not_trained_on_and_not_kept(
    volume_breaks: bool, pod: Pods
) -> None:
    class Damaging(FolderSource):
        def fetch(self, names: Any, folder: Path) -> None:
            super().fetch(names, folder)
            if "model.safetensors" in names:
                other_bytes(folder / "model.safetensors")
            if volume_breaks:
                shutil.rmtree(pod.cache / FOLDER, ignore_errors=True)

    files = Damaging(pod.source, pod.log)
    folder = pod.new_folder()
    folder.mkdir()
    sentence = r"^model\.s3\.uri: model\.safetensors was not received as it is: its sha256 digest is not [0-9a-f]{64}$"
    with pytest.raises(OutsideFailure, match=sentence):
        fetch_model_files(files, list(files.sizes), folder, pod.cache, NoDigests(), QUICK)
    assert not pod.cached()["model.safetensors"].exists()
    assert "model.safetensors" in pod.fetch()


def test_an_error_of_the_source_ends_the_turn_and_is_passed_on(pod: Pods) -> None:
    class Refusing(FolderSource):
        def fetch(self, names: Any, folder: Path) -> None:
            raise UserError("model.s3.uri", "vanished")

    files = Refusing(pod.source, pod.log)
    folder = pod.new_folder()
    folder.mkdir()
    with pytest.raises(UserError, match="vanished"):
        fetch_model_files(files, list(files.sizes), folder, pod.cache, NoDigests(), QUICK)
    assert list((pod.cache / FOLDER).iterdir()) == []


def test_a_full_scratch_folder_is_named(pod: Pods, small_volume: Path) -> None:
    pod.fetch()
    scratch = small_volume / "scratch"
    scratch.mkdir()
    (small_volume / "ballast").write_bytes(bytes(40 * MIB))
    files = FolderSource(pod.source, pod.log)
    with pytest.raises(OutsideFailure, match=r"^a downloaded file can't be written to .*: No space left on device$"):
        fetch_model_files(files, list(files.sizes), scratch, small_volume, NoDigests(), QUICK)


def test_a_file_that_fails_again_when_it_is_closed_is_named_too(pod: Pods) -> None:
    """A small file is written when it is closed. What could not be written is written again by a second close."""
    pod.fetch()
    digest = digest_of(FolderSource(pod.source, pod.log), "config.json")
    folder = pod.new_folder()
    folder.mkdir()
    (folder / "config.json").symlink_to("/dev/full")
    with (
        ModelCache(pod.cache) as opened,
        pytest.raises(OutsideFailure, match=r"^a downloaded file can't be written to .*: No space left on device$"),
    ):
        opened.copy_out(digest, folder / "config.json")


@pytest.mark.parametrize(
    ("sha256", "blob_id"), [("../../etc/passwd", "0" * 40), ("", "0" * 40), (None, "main"), (None, "0" * 41)]
)
def test_what_the_hub_calls_a_digest_and_is_none_names_no_file(sha256: str | None, blob_id: str) -> None:
    assert hub_digest(size=1, sha256=sha256, blob_id=blob_id) is None


@pytest.mark.parametrize("etag", ["", "abc", "../x", "0" * 32 + "-0", "0" * 32 + "-x", "0" * 33])
def test_an_etag_of_another_form_is_no_digest(etag: str) -> None:
    assert object_digest(size=1, etag=etag, form=lambda in_parts: EtagForm(1)) is None


@pytest.fixture(scope="module")
def proxy(store: ObjectStore) -> Iterator[StoreProxy]:
    with proxy_before(store.endpoint) as running:
        yield running


def model_downloads(proxy: StoreProxy, prefix: str) -> Counter[str]:
    """Return how often each object below ``prefix`` was downloaded through the proxy."""
    start = f"/{BUCKET}/{prefix}/"
    found = [request.path for request in proxy.requests if request.method == "GET" and request.path.startswith(start)]
    return Counter(path.removeprefix(start).partition("?")[0] for path in found)


def fetched_by_pods(
    store: ObjectStore, proxy: StoreProxy, cache: Path, folder: Path, prefix: str, jobs: list[str]
) -> Counter[str]:
    """Let one pod for each name in ``jobs`` fetch the model below ``prefix``. The name is that of the pod's job. Return
    how often each object was downloaded."""
    client = Store(proxy.endpoint, "us-east-1", store.credentials)
    config = run_config(store, "any", model={"s3": {"uri": f"s3://{BUCKET}/{prefix}"}})
    proxy.requests.clear()
    for job in jobs:
        files = model_files(RunConfig.model_validate(config).model, Paths(), client)
        pod = Path(tempfile.mkdtemp(dir=folder))
        own = ModelDigests(RunRoot(client, parse_uri(f"s3://{BUCKET}/runs/default/{job}/uid")))
        fetch_model_files(files, list(files.sizes), pod, cache, own, QUICK)
        for name in files.sizes:
            assert (pod / name).read_bytes() == store.read(f"{prefix}/{name}")
    return model_downloads(proxy, prefix)


def test_the_etags_of_a_real_store_are_verified_also_after_an_upload_in_parts(
    store: ObjectStore, proxy: StoreProxy, source: Path, cache: Path, tmp_path: Path
) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(os.urandom(21 * MIB + 5))
    store.upload("cached/parts", source)
    store.client.fput_object(BUCKET, "cached/parts/model.safetensors", str(weights), part_size=5 * MIB)
    counted = fetched_by_pods(store, proxy, cache, tmp_path, "cached/parts", ["d", "e"])
    assert counted == {"config.json": 1, "tokenizer.json": 1, "model.safetensors": 1}
    (spoilt,) = [path for path in (cache / FOLDER).iterdir() if "-5-" in path.name]
    other_bytes(spoilt)
    assert fetched_by_pods(store, proxy, cache, tmp_path, "cached/parts", ["f"]) == {"model.safetensors": 1}
    assert [key for key in store.keys("runs/") if "model-digests" in key] == []


@pytest.fixture(scope="module")
def encrypting(minio: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An object store that encrypts all objects with its key management service."""
    variables = {"MINIO_KMS_SECRET_KEY": f"key:{b64encode(bytes(32)).decode()}", "MINIO_KMS_AUTO_ENCRYPTION": "on"}
    with running_store(minio, tmp_path_factory.mktemp("encrypting"), variables=variables) as running:
        yield running


def test_of_objects_whose_etag_is_no_digest_each_job_fetches_its_own(
    encrypting: ObjectStore, source: Path, cache: Path, tmp_path: Path
) -> None:
    """The first pod of a job computes the digests, and the other pods of this job find them in the bucket. A second job
    does not trust the digests of the first one."""
    encrypting.upload("model", source)
    with proxy_before(encrypting.endpoint) as proxy:
        counted = fetched_by_pods(encrypting, proxy, cache, tmp_path, "model", ["a", "a", "a", "b"])
        assert counted == {"config.json": 2, "tokenizer.json": 2, "model.safetensors": 2}
        for path in (cache / FOLDER).iterdir():
            other_bytes(path)
        assert fetched_by_pods(encrypting, proxy, cache, tmp_path, "model", ["a", "b"])["model.safetensors"] == 1


def test_an_object_that_is_replaced_is_fetched_again(
    encrypting: ObjectStore, source: Path, cache: Path, tmp_path: Path
) -> None:
    with proxy_before(encrypting.endpoint) as proxy:
        for number in range(2):
            (source / "model.safetensors").write_bytes(os.urandom(SMALL_BYTES + 1))
            encrypting.upload("replaced", source, replacing=True)
            folder = tmp_path / str(number)
            folder.mkdir()
            counted = fetched_by_pods(encrypting, proxy, cache, folder, "replaced", ["c"])
            assert counted["model.safetensors"] == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"bytes": -1, "sha256": "x"}', b'{"bytes": 1}', b"x" * 2000], ids=range(6)
)
def test_a_malformed_record_of_a_digest_counts_as_none(content: bytes, store: ObjectStore) -> None:
    root = RunRoot(Store(store.endpoint, "us-east-1", store.credentials), parse_uri(f"s3://{BUCKET}/runs/records"))
    own = ModelDigests(root)
    assert own.note("a", "tag", ObjectDigest(5, "0" * 64))
    assert not own.note("a", "tag", ObjectDigest(5, "1" * 64))
    assert own.find({"a": "tag", "b": "tag"}) == {"a": ObjectDigest(5, "0" * 64)}
    (entry,) = root.list_objects("model-digests/")
    root.write(entry.key, content)
    assert own.find({"a": "tag"}) == {}
    root.delete([entry.key])


class OtherEtags(FolderSource):
    """A source whose ETags look like digests, but are none. ``damaged`` lists the downloads of the weights, counted
    from 0, that arrive with another content."""

    damaged: tuple[int, ...] = ()
    downloads = 0

    def digest(self, name: str) -> ContentDigest | None:
        return object_digest(size=self.sizes[name], etag="0" * 32, form=lambda in_parts: EtagForm(0))

    def fetch(self, names: Any, folder: Path) -> None:
        super().fetch(names, folder)
        if "model.safetensors" in names:
            if self.downloads in self.damaged:
                other_bytes(folder / "model.safetensors")
            self.downloads += 1


@pytest.mark.parametrize("damaged", [(), (0,), (1,)], ids=["never", "first", "second"])
def test_where_an_etag_is_no_digest_without_a_word_two_downloads_must_agree(
    damaged: tuple[int, ...], pod: Pods, store: ObjectStore
) -> None:
    location = parse_uri(f"s3://{BUCKET}/runs/etags/{len(damaged)}{sum(damaged)}")
    own = ModelDigests(RunRoot(Store(store.endpoint, "us-east-1", store.credentials), location))
    files = OtherEtags(pod.source, pod.log)
    files.damaged = damaged
    folder = pod.new_folder()
    folder.mkdir()
    if damaged:
        with pytest.raises(OutsideFailure, match=r"is: its content was another one the second time$"):
            fetch_model_files(files, list(files.sizes), folder, pod.cache, own, QUICK)
        return
    fetch_model_files(files, list(files.sizes), folder, pod.cache, own, QUICK)
    pod.check(folder)
    before = len(pod.fetched())
    folder = pod.new_folder()
    folder.mkdir()
    fetch_model_files(files, list(files.sizes), folder, pod.cache, own, QUICK)
    pod.check(folder)
    assert len(pod.fetched()) == before


def test_a_file_of_the_hub_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client takes names as glob patterns."""
    repository, folder = tmp_path / "repository", tmp_path / "model"
    repository.mkdir()
    names = ["a[1].json", "a1.json", "b*.json", "bc.json", "d?.json", "de.json"]
    for name in names:
        (repository / name).write_text(name)
    with running_hub({"team/tiny": repository}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        wanted = names[::2]
        HubFiles(HuggingFaceSource(repo="team/tiny", revision="main"), TOKEN).fetch(wanted, folder)
    assert {file.name: file.read_text() for file in folder.iterdir() if file.is_file()} == {
        name: name for name in wanted
    }


def test_the_digests_of_the_hub_are_verified(
    tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: ObjectStore
) -> None:
    """The second pod asks the hub only for the list of files. The third pod finds a wrong file in the cache, and
    fetches this file anew."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    spec = RunConfig.model_validate(run_config(store, "hub", model={"huggingFace": {"repo": "team/tiny"}})).model
    resolved: list[list[str]] = []
    with running_hub({"team/tiny": tiny_model}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for number in range(3):
            files = model_files(
                spec, Paths(hub_token_file=token), Store(store.endpoint, "us-east-1", store.credentials)
            )
            folder = tmp_path / f"pod-{number}"
            folder.mkdir()
            hub.requests.clear()
            fetch_model_files(files, list(files.sizes), folder, cache, NoDigests(), QUICK)
            resolved.append([request for request in hub.requests if request.startswith("GET /team/tiny/resolve/")])
            for path in tiny_model.iterdir():
                assert (folder / path.name).read_bytes() == path.read_bytes()
            if number == 1:
                other_bytes(max((cache / FOLDER).iterdir(), key=lambda path: path.stat().st_size))
    kinds = {path.name.partition("-")[0] for path in (cache / FOLDER).iterdir()}
    assert kinds == {"sha256", "git"}
    assert (len(resolved[0]), len(resolved[1]), len(resolved[2])) == (len(list(tiny_model.iterdir())), 0, 1)


def test_pods_of_one_attempt_and_of_another_job_fetch_the_model_once(
    store: ObjectStore, proxy: StoreProxy, pods: StartPods, cache: Path
) -> None:
    proxy.requests.clear()
    for name, nodes in (("cached-1", 2), ("cached-2", 1)):
        config = run_config(store, name, world__nodes=nodes, optimization__maxSteps=1, dataset__validation=None)
        config["storage"]["endpoint"] = proxy.endpoint
        attempt = pods(config, arguments=("--model-cache", str(cache)), forked=True)
        assert attempt.wait() == [0] * nodes, attempt.output
    counted = model_downloads(proxy, "models/tiny")
    assert counted["model.safetensors"] == 1
    assert set(counted.values()) == {1}


def test_a_volume_of_the_pod_itself_holds_the_model_instead_of_the_scratch_folder(
    store: ObjectStore, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    folder = tmp_path / "attempt"
    folder.mkdir()
    config = RunConfig.model_validate(run_config(store, "own-volume"))
    client = Store(store.endpoint, "us-east-1", store.credentials)
    root = RunRoot(client, parse_uri(config.storage.uri))
    inputs = fetch_inputs(config, Paths(model_volume=volume, model_cache=tmp_path / "none"), root, folder)
    assert inputs.model == volume / "model"
    assert (inputs.model / "model.safetensors").is_file()
    assert not (folder / "model").exists()


def test_the_check_before_the_first_attempt_says_what_a_cache_can_not_do(
    store: ObjectStore, tmp_path: Path, small_volume: Path
) -> None:
    assert cache_notices(1, small_volume) == []
    assert cache_notices(62 * MIB, small_volume) == [
        "storage.cache: the volume has room for 60 MiB of models, and the model has 62 MiB, so pods fetch the rest each"
        " time"
    ]
    assert list((small_volume / FOLDER).iterdir()) == []
