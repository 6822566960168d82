"""Whatever an object store answers is a result or an outside failure: never a crash, and never the user's fault."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.client import ListedObject, ObjectDigest, Store
from tests.trainer.objectstore import write_credentials


@dataclass
class Answer:
    """What the store answers to every request."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class AnyStore(ThreadingHTTPServer):
    answer = Answer()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer: Answer = self.server.answer  # type: ignore[attr-defined]
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET  # noqa: N815

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
    st.tuples(st.sampled_from(["ETag", "Last-Modified", "x-amz-version-id", "Content-Type"]), TEXT), max_size=4
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
    LISTING | ERROR | st.binary(max_size=40),
)


def test_any_answer_of_the_store_is_a_result_or_an_outside_failure(server: AnyStore, tmp_path: Path) -> None:
    write_credentials(tmp_path, "key", "secret")
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    store = Store(endpoint, "us-east-1", tmp_path, budget_seconds=0)
    outcomes: Counter[str] = Counter()

    @given(ANSWERS)
    @example(Answer(body=b"<ListBucketResult><Contents><Key>a</Key><Size>many</Size></Contents></ListBucketResult>"))
    @example(Answer(headers=(("Last-Modified", "yesterday"), ("ETag", '"0"'))))
    @settings(max_examples=80, deadline=None)
    def ask(answer: Answer) -> None:
        server.answer = answer
        for request in (
            lambda: store.list_objects("bucket", "rows/"),
            lambda: store.stat("bucket", "key"),
            lambda: store.read_range("bucket", "key", 0, 10),
            lambda: store.download("bucket", "key", tmp_path / "file"),
        ):
            try:
                found = request()
            except OutsideFailure as error:
                outcomes["failure"] += 1
                assert "\n" not in str(error)  # noqa: PT017
            else:
                outcomes["result"] += 1
                assert found is None or isinstance(found, list | ListedObject | bytes | ObjectDigest)

    ask()
    assert min(outcomes["failure"], outcomes["result"]) > 20
