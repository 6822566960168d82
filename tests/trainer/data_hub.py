"""A stand-in for the Hugging Face Hub with one repository, of a data set or of a model: an HTTP server on loopback with
the few endpoints that huggingface_hub requests.

The tests have no access to the real hub. The server has one repository at one commit, asks for a token if the test sets
one, and records the requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The one repository that the server offers, and the paths of all requests that the server has received."""

    repo: str
    files: dict[str, bytes]
    kind: str = "datasets"
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str | None = None
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Record the request for ``path`` in `asked`, and return status, headers and body of the response."""
        self.asked.append(path)
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b""
        prefix = f"/{self.kind}/{self.repo}/resolve/".removeprefix("/models")
        if path.startswith(prefix):
            revision, _, name = path.removeprefix(prefix).partition("/")
            if revision not in self.revisions or name not in self.files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            etag = hashlib.sha256(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, self.files[name]
        api = f"/api/{self.kind}/{self.repo}"
        if path != api and not path.startswith(f"{api}/"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        what, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision = rest.partition("/")[0] or "main"
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if what == "tree":
            body: object = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in self.files.items()
            ]
        else:
            names = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha256(data).hexdigest()[:40]}
                for name, data in self.files.items()
            ]
            body = {"id": self.repo, "sha": COMMIT, "siblings": names, "private": False, "tags": [], "downloads": 0}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        # The body of a response is sent at once. With Nagle's algorithm the body would wait until the client has
        # acknowledged the head.
        disable_nagle_algorithm = True
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = hub.answer(path, self.headers.get("Authorization"))
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and status == 200:
                status, body = 206, body[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), **headers}
            for key, value in headers.items():
                self.send_header(key, value)
            # Where the body has another length than announced, a client can't find the next response, so the connection
            # is closed.
            self.close_connection = headers["Content-Length"] != str(len(body))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Suppress the server's log lines."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def ask_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client library in this process send all requests to ``hub``, and not wait before it repeats a request."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
