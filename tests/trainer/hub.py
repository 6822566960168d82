"""A stand-in for model repositories on the Hugging Face Hub: an HTTP server on loopback with the endpoints that
`huggingface_hub` requests (file tree, revision, files with byte ranges) and the hub's refusals.

The tests have no access to the real hub, but they use the real client.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_the-right-token"


@dataclass
class Hub:
    """Address of the server, the repositories that it refuses, and the requests that it has received."""

    endpoint: str
    gated: set[str] = field(default_factory=set)
    """Repositories that are refused with status 403 although the token is right, as for a gated model."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, for example `GET /api/models/org/tiny/tree/main`."""


@contextmanager
def running_hub(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Run a server that offers local folders as model repositories. Every request must carry the token `TOKEN`."""

    class Handler(_Handler):
        folders = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _listed(path: Path) -> dict[str, Any]:
    """Return the entry of a file in the file tree. As on the hub, weights are in Git LFS: the Git id in their entry is
    that of a pointer file, which names the sha256 of the content."""
    content = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": path.name, "size": len(content), "oid": _git_id(content)}
    if path.suffix == ".safetensors":
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry["oid"] = _git_id(pointer)
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return entry


class _Handler(BaseHTTPRequestHandler):
    # The body of a response is sent at once. With Nagle's algorithm the body would wait until the client has
    # acknowledged the head.
    disable_nagle_algorithm = True

    folders: Mapping[str, Path]
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print no log line. The tests read `Hub.requests` instead."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, action, revision, file = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or repository not in self.folders:
            return self._refuse(401, "RepoNotFound", with_body)
        if repository in self.hub.gated:
            return self._refuse(403, "GatedRepo", with_body)
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound", with_body)
        folder = self.folders[repository]
        files = sorted(item for item in folder.iterdir() if item.is_file())
        if action == "tree":
            return self._send(json.dumps([_listed(item) for item in files]).encode(), "application/json", with_body)
        if action == "revision":
            siblings = [{"rfilename": item.name} for item in files]
            model = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": True, "tags": [], "downloads": 0}
            return self._send(json.dumps(model).encode(), "application/json", with_body)
        return self._send((folder / file).read_bytes(), "application/octet-stream", with_body)

    def _refuse(self, status: int, code: str, with_body: bool) -> None:
        body = json.dumps({"error": code}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _send(self, body: bytes, kind: str, with_body: bool) -> None:
        wanted = self.headers.get("Range", "")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body = body[int(first) : int(last or len(body)) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
