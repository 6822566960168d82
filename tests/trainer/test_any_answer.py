"""Any answer of the object store or of the Hugging Face Hub becomes a result, an outside failure or a sentence for the
user, and never a crash. The clients are the real ones, and the servers give random answers."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_core.api.sources import HuggingFaceDataSource, ModelSpec
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.hub_datasets import HubDataFiles
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.sources.source_files import HeadLimits
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.run_store import ListedObject, ObjectDigest
from tests.trainer.data_hub import COMMIT, Hub, ask_only, served
from tests.trainer.objectstore import write_credentials


@dataclass
class Answer:
    """What the store answers to every request."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    longer: int = 0
    """By how many bytes the announced length exceeds the length of the body. May be negative."""


class AnyStore(ThreadingHTTPServer):
    answer = Answer()


class Handler(BaseHTTPRequestHandler):
    # The body of a response is sent at once. With Nagle's algorithm the body would wait until the client has
    # acknowledged the head.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: Answer = self.server.answer  # type: ignore[attr-defined]
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(max(0, len(answer.body) + answer.longer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Suppress the server's log lines."""


@pytest.fixture
def server() -> Iterator[AnyStore]:
    with AnyStore(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "ETag",
                "Last-Modified",
                "x-amz-version-id",
                "Content-Type",
                "Location",
                "Content-Encoding",
                "Content-Range",
            ]
        ),
        TEXT,
    ),
    max_size=4,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "Key": TEXT,
        "Size": TEXT | st.integers().map(str),
        "LastModified": TEXT | st.just("2026-01-01T00:00:00.000Z"),
        "ETag": TEXT,
    },
)
LISTING = st.tuples(st.lists(ENTRY, max_size=3), TEXT).map(
    lambda parts: (
        "<ListBucketResult><IsTruncated>false</IsTruncated>"
        + "".join(
            f"<Contents>{''.join(f'<{name}>{escape(value)}</{name}>' for name, value in entry.items())}</Contents>"
            for entry in parts[0]
        )
        + f"<Name>{escape(parts[1])}</Name></ListBucketResult>"
    ).encode()
)
ERROR = st.tuples(TEXT, TEXT).map(
    lambda parts: f"<Error><Code>{escape(parts[0])}</Code><Message>{escape(parts[1])}</Message></Error>".encode()
)
ANSWERS = st.builds(
    Answer,
    st.sampled_from([200, 200, 204, 206, 301, 307, 400, 403, 404, 412, 500, 503]),
    HEADERS.map(tuple),
    LISTING | ERROR | st.binary(max_size=40) | st.just(b"<html><body>Please log in</body></html>"),
    st.sampled_from([0, 0, 0, -1, 5]),
)


def test_any_answer_of_the_store_is_a_result_or_an_outside_failure(server: AnyStore, tmp_path: Path) -> None:
    write_credentials(tmp_path, "key", "secret")
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    store = Store(endpoint, "us-east-1", tmp_path, budget_seconds=0)
    outcomes: Counter[str] = Counter()

    @given(ANSWERS)
    @example(Answer(body=b"<ListBucketResult><Contents><Key>a</Key><Size>many</Size></Contents></ListBucketResult>"))
    @example(Answer(headers=(("Last-Modified", "yesterday"), ("ETag", '"0"'))))
    @example(Answer(body=b"half", longer=4))
    @example(Answer(301, body=b"\n"))
    @example(Answer(307, (("Location", "http://127.0.0.1:9/elsewhere"), ("Content-Type", "application/xml")), b"<E/>"))
    @example(Answer(headers=(("Content-Encoding", "gzip"),), body=b"no gzip"))
    @settings(max_examples=80)
    def ask(answer: Answer) -> None:
        server.answer = answer
        for request in (
            lambda: store.list_objects("bucket", "rows/"),
            lambda: store.stat("bucket", "key"),
            lambda: store.read_range("bucket", "key", 0, 10),
            lambda: store.download("bucket", "key", tmp_path / "file"),
            lambda: store.read("bucket", "key"),
            lambda: store.list_folders("bucket", "rows/", 3),
            lambda: store.write("bucket", "key", b"data"),
            lambda: store.create("bucket", "key", b"data"),
            lambda: store.delete("bucket", ["key"]),
            lambda: store.abort_multipart_uploads("bucket", "rows/"),
        ):
            try:
                found = request()
            except OutsideFailure as error:
                outcomes["failure"] += 1
                assert "\n" not in str(error)  # noqa: PT017
            else:
                outcomes["result"] += 1
                assert found is None or isinstance(found, list | ListedObject | bytes | ObjectDigest | bool)

    ask()
    assert min(outcomes["failure"], outcomes["result"]) > 20


def test_an_error_of_the_trainer_itself_is_not_taken_for_one_of_the_store(
    server: AnyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_credentials(tmp_path, "key", "secret")
    store = Store(f"http://127.0.0.1:{server.server_address[1]}", "us-east-1", tmp_path, budget_seconds=0)
    server.answer = Answer(body=b"data")

    def faulty(*_: object, **__: object) -> None:
        raise KeyError("a fault of the trainer")

    monkeypatch.setattr("finetune_trainer.storage.client.ObjectDigest", faulty)
    with pytest.raises(KeyError, match="a fault of the trainer"):
        store.download("bucket", "key", tmp_path / "file")


def test_a_store_that_knows_no_ranges_gives_the_beginning_of_an_object_and_no_other_part(
    server: AnyStore, tmp_path: Path
) -> None:
    write_credentials(tmp_path, "key", "secret")
    store = Store(f"http://127.0.0.1:{server.server_address[1]}", "us-east-1", tmp_path, budget_seconds=0)
    server.answer = Answer(body=b"0123456789")
    assert store.read_range("bucket", "key", 0, 4) == b"0123"
    with pytest.raises(OutsideFailure, match="the answer is not the range of bytes that was asked for"):
        store.read_range("bucket", "key", 4, 4)


def test_a_file_that_can_not_be_written_is_no_fault_of_the_store(server: AnyStore, tmp_path: Path) -> None:
    write_credentials(tmp_path, "key", "secret")
    store = Store(f"http://127.0.0.1:{server.server_address[1]}", "us-east-1", tmp_path, budget_seconds=0)
    server.answer = Answer(body=b"data")
    with pytest.raises(OutsideFailure, match=r"^a downloaded file can't be written to .*: No such file or directory$"):
        store.download("bucket", "key", tmp_path / "no folder" / "file")


@pytest.mark.parametrize("kind", [KeyError, AttributeError, UnicodeDecodeError, RecursionError])
def test_a_library_that_fails_becomes_the_failure_of_its_boundary(kind: type[Exception]) -> None:
    error = kind("utf-8", b"\xff", 0, 1, "no text") if kind is UnicodeDecodeError else kind("odd\nlines")
    with pytest.raises(OutsideFailure, match=r"^failed: [^\n]+$"), library_boundary(failed):
        raise error


def test_a_panic_of_rust_code_becomes_the_failure_of_its_boundary() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(OutsideFailure, match=r"^failed: index out of bounds$"), library_boundary(failed):
        raise panic("index out of bounds")


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), UserError("a", "b"), KeyError("x")])
def test_what_has_a_meaning_of_its_own_passes_a_boundary_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_boundary(failed, KeyError):
        raise error
    assert caught.value is error


def no_store() -> Any:
    """Return None in place of a store, because a model on the hub needs no store."""
    return None


def failed(error: BaseException) -> Exception:
    return OutsideFailure(f"failed: {first_line(error)}")


ODD_HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "ETag",
            "Location",
            "X-Repo-Commit",
            "X-Linked-Size",
            "X-Linked-Etag",
            "X-Error-Code",
            "X-Error-Message",
            "X-Xet-Hash",
            "Content-Encoding",
            "Content-Type",
            "Content-Length",
            "Content-Range",
            "Link",
        ]
    ),
    st.sampled_from(['"0123"', "0", "-1", "7", "many", "", "gzip", "text/html", "RepoNotFound", "/other", COMMIT]),
    max_size=4,
)
BODIES = (
    st.binary(max_size=12)
    | st.just(b"<html>Please log in</html>")
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode())
)
HUB_ANSWERS = st.tuples(
    st.sampled_from([200, 200, 204, 206, 302, 307, 400, 401, 403, 404, 416, 418]), ODD_HEADERS, BODIES
)


class MovingHub(Hub):
    """A hub that answers the next `honest` requests as a hub does, and all later requests with the response `odd`:
    status, headers and body."""

    honest = 0
    odd: tuple[int, dict[str, str], bytes] = (200, {}, b"")

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        self.honest -= 1
        return super().answer(path, token) if self.honest >= 0 else self.odd


@pytest.mark.parametrize("kind", ["datasets", "models"])
def test_any_answer_of_the_hub_is_a_result_or_a_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "a.txt": b"one\ntwo\n", "model.safetensors": b"12345678", "README.md": b"# Rows"}
    outcomes: Counter[str] = Counter()
    with served(MovingHub("acme/rows", files, kind)) as hub:
        ask_only(hub, monkeypatch)

        def read_rows_of_hub(folder: Path) -> object:
            source = HuggingFaceDataSource(repo="acme/rows", path="a.txt")
            found = HubDataFiles(source, "dataset.train", None, folder)
            found.fetch_head(found.files[0], folder, HeadLimits(100, 100, ["text"]))
            return [file.path.read_bytes() for file in found.fetch(found.files, folder)]

        def read_model(folder: Path) -> object:
            paths = Paths(hub_token_file=folder / "token", scratch=folder)
            source = ModelSpec.model_validate({"huggingFace": {"repo": "acme/rows", "revision": COMMIT}})
            found = model_files(source, paths, no_store())
            found.read("model.safetensors", 4, 4)
            found.fetch(["config.json"], folder)
            return found.tag("config.json")

        @given(HUB_ANSWERS, st.integers(0, 5))
        @example((200, {"Content-Length": "7", "ETag": '"0"', "X-Repo-Commit": COMMIT}, b"half"), 2)
        @example((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b""), 1)
        @settings(max_examples=60)
        def ask(odd: tuple[int, dict[str, str], bytes], honest: int) -> None:
            hub.odd, hub.honest = odd, honest  # type: ignore[attr-defined]
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            try:
                (read_rows_of_hub if kind == "datasets" else read_model)(folder)
                outcomes["result"] += 1
            except (UserError, OutsideFailure) as error:
                outcomes[type(error).__name__] += 1
                assert "\n" not in str(error)  # noqa: PT017

        ask()
    assert outcomes["OutsideFailure"] > 5
