"""A proxy that answers refused conditional writes with success.

Through the proxy a real store answers like an old S3-compatible store that ignores `If-None-Match`, although the real
store keeps the first object. No store that ignores the header is available to the tests.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@contextmanager
def swallowing_store(endpoint: str) -> Iterator[str]:
    """Run a proxy that turns each status 412 of the store at ``endpoint`` into 200, and yield the proxy's address."""
    host = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Suppress the server's log lines."""

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # The Host header is forwarded unchanged, because the request's signature covers it.
            behind = http.client.HTTPConnection(host, timeout=30)
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            status, content = answer.status, answer.read()
            if status == http.client.PRECONDITION_FAILED:
                status, content = http.client.OK, b""
            self.send_response(status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            behind.close()

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_one)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
