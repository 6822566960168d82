"""A file may have any bytes as its key in a bucket or its name on a volume, and any text as its path on the Hugging
Face Hub. The file is then read or left out, or the user gets a sentence. The clients are the real ones."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_core.api.sources import DataSource, ModelSpec
from finetune_core.errors import UserError
from finetune_trainer.data.reader import read_rows
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.inputs import data_file, source_name
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, model_files
from finetune_trainer.storage.client import Store
from tests.trainer.data_hub import COMMIT, Hub, ask_only, served
from tests.trainer.objectstore import write_credentials


class Bucket(ThreadingHTTPServer):
    """A store with one bucket, whose objects have any keys."""

    objects: Mapping[bytes, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    # The server sends the body of an answer at once. Otherwise TCP would hold the body back until the client has
    # acknowledged the head.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        objects: Mapping[bytes, bytes] = self.server.objects  # type: ignore[attr-defined]
        key = unquote_to_bytes(url.path).removeprefix(b"/bucket").removeprefix(b"/")
        if "list-type=2" in url.query:
            entries = "".join(
                f"<Contents><Key>{quote(name)}</Key><Size>{len(body)}</Size>"
                f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>0</ETag></Contents>"
                for name, body in sorted(objects.items())
            )
            listing = f"<Name>bucket</Name><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{entries}"
            self._send(200, f"<ListBucketResult>{listing}</ListBucketResult>".encode())
        elif key in objects:
            self._send(200, objects[key])
        else:
            self._send(404, b"<Error><Code>NoSuchKey</Code><Message>x</Message></Error>")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Suppress the server's log lines."""


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with Bucket(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


KEYS = st.lists(
    st.binary(max_size=8) | st.text(max_size=8).map(lambda text: text.encode(errors="replace")), max_size=3, unique=True
)
ODD_KEYS = [b"\xff", b"a\x00b", b"../../../etc/x", b".", b"x" * 300, b"a//b", b"%2e%2e", b"\n", b"a\\b", b"?#&"]


def read_data(source: DataSource, paths: Paths, store: Any, folder: Path) -> str:
    """Fetch the data of ``source`` into ``folder``, and read all rows."""
    local = data_file(source, "dataset.train", paths, store, folder / "data")
    for row in read_rows(local, "dataset.train"):
        assert row.place(source_name(source)).encode()
    return "rows"


def read_model(spec: ModelSpec, paths: Paths, store: Any, folder: Path) -> str:
    found = model_files(spec, paths, store)
    (folder / "model").mkdir()
    found.fetch([name for name in found.sizes if name.endswith(MODEL_SUFFIXES)], folder / "model")
    assert all(found.tag(name) for name in found.sizes)
    return "model"


def check(made: Path, outcomes: Counter[str], work: Any, *arguments: Any) -> None:
    folder = Path(tempfile.mkdtemp(dir=made))
    try:
        outcomes[work(*arguments, folder)] += 1
    except (UserError, OutsideFailure) as error:
        outcomes[type(error).__name__] += 1
        assert "\n" not in str(error)  # noqa: PT017
    assert {path.name for path in made.iterdir()} == {other.name for other in made.iterdir() if other.is_dir()}
    assert {path.name for path in folder.iterdir()} <= {"data", "data.card", "model"}


def test_any_bytes_as_the_keys_of_a_bucket_are_files_or_a_sentence(bucket: Bucket, tmp_path: Path) -> None:
    write_credentials(tmp_path / "keys", "key", "secret")
    made = tmp_path / "made"
    made.mkdir()
    endpoint = f"http://127.0.0.1:{bucket.server_address[1]}"
    store = Store(endpoint, "us-east-1", tmp_path / "keys", budget_seconds=0)
    outcomes: Counter[str] = Counter()

    @given(KEYS, st.sampled_from([b".txt", b".json", b""]))
    @example(ODD_KEYS, b".txt")
    @example([b"\n\x80"], b".txt")
    @example(ODD_KEYS, b".json")
    @settings(max_examples=30)
    def ask(keys: list[bytes], suffix: bytes) -> None:
        bucket.objects = {b"rows/" + key + suffix: b"one\n" for key in keys} | {b"rows/good.txt": b"one\n"}
        data = DataSource.model_validate({"s3": {"uri": "s3://bucket/rows"}})
        check(made, outcomes, read_data, data, Paths(), store)
        model = dict.fromkeys((b"m/config.json", b"m/model.safetensors"), b"{}")
        bucket.objects = model | {b"m/" + key + suffix: b"{}" for key in keys}
        check(made, outcomes, read_model, ModelSpec.model_validate({"s3": {"uri": "s3://bucket/m"}}), Paths(), store)

    ask()
    assert min(outcomes["rows"], outcomes["model"]) > 5


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
FILE_NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & {0, ord("/")})


class OpenHub(Hub):
    """A hub that has every file, and lists only the files `names`."""

    names: tuple[str, ...] = ()

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        if "/resolve/" in path:
            return 200, {"ETag": '"0"', "X-Repo-Commit": COMMIT}, b"one\n"
        if "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": 4, "oid": "0"} for name in self.names]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        siblings = [{"rfilename": name, "size": 4, "blobId": "0"} for name in self.names]
        document = {
            "id": "acme/rows",
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def test_any_text_as_the_paths_of_a_repository_is_files_or_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: Counter[str] = Counter()
    made = tmp_path / "made"
    made.mkdir()
    with served(OpenHub("acme/rows", {})) as hub:
        ask_only(hub, monkeypatch)

        @given(
            st.lists(st.text(st.characters(exclude_categories=[]), max_size=8), max_size=3),
            st.sampled_from([".txt", ".json"]),
        )
        @example(["../../x", "/etc/x", ".", "a//b", "x" * 300, "\x00", "\ud800", "C:\\x", "?#%2e%2e"], ".txt")
        @example(["../../x", "/etc/x", ".", "a//b", "x" * 300, "\x00", "\ud800", "C:\\x", "?#%2e%2e"], ".json")
        @settings(max_examples=8)
        def ask(names: list[str], suffix: str) -> None:
            files = [f"{name}{suffix}" for name in names]
            hub.names = (*files, "good.txt")  # type: ignore[attr-defined]
            for hub_source in ({"path": "."}, {"path": "*.txt"}, {"split": "train"}):
                data = DataSource.model_validate({"huggingFace": {"repo": "acme/rows", **hub_source}})
                check(made, outcomes, read_data, data, Paths(), None)
            hub.names = (*files, "config.json", "model.safetensors")  # type: ignore[attr-defined]
            spec = ModelSpec.model_validate({"huggingFace": {"repo": "acme/rows", "revision": COMMIT}})
            check(made, outcomes, read_model, spec, Paths(hub_token_file=tmp_path / "none"), None)

        ask()
    assert min(outcomes["rows"], outcomes["model"]) > 5


@given(name=FILE_NAMES)
def test_any_bytes_as_a_name_in_a_models_folder_on_a_volume_make_a_model(
    tmp_path_factory: pytest.TempPathFactory, name: bytes
) -> None:
    base = tmp_path_factory.mktemp("volumes")
    (base / "claim" / "m").mkdir(parents=True)
    for file in (b"config.json", b"model.safetensors", name + b".json"):
        (base / "claim" / "m" / os.fsdecode(file)).write_bytes(b"{}")
    outcomes: Counter[str] = Counter()
    spec = ModelSpec.model_validate({"volume": {"claimName": "claim", "path": "m"}})
    (base / "made").mkdir()
    check(base / "made", outcomes, read_model, spec, Paths(volumes=base), None)
    assert outcomes == {"model": 1}


def test_a_models_folder_that_can_not_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "circle").symlink_to("circle")
    (tmp_path / "claim" / "out").symlink_to("/etc")
    for path, sentence in (
        ("circle", "model.volume.path: "),
        ("out", "model.volume.path: must not lead out of the volume"),
        ("missing", "model.volume.path: there is no 'missing' in volume 'claim'"),
        ("x" * 300, "model.volume.path: "),
    ):
        spec = ModelSpec.model_validate({"volume": {"claimName": "claim", "path": path}})
        with pytest.raises((UserError, OutsideFailure)) as caught:
            model_files(spec, Paths(volumes=tmp_path), None)  # type: ignore[arg-type]
        assert str(caught.value).startswith(sentence)
