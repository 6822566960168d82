"""Takes the reports of rank 0 over the loopback interface, as the operator takes them in a cluster.

`run_job.py` opens a receiver around the training. Only a client that knows the token is heard. The trainer posts in a
thread of its own and drops what can't be posted, so a receiver that is slow or gone holds no training up.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import ValidationError

from finetune_core.contract import Report, ReportConfig
from finetune_core.contract.report import REPORT_LIMIT_BYTES, report_path

INTERVAL_SECONDS = 0.5
"""Seconds between two reports."""
LOOPBACK = "127.0.0.1"
REQUEST_SECONDS = 5.0
"""Longest pause in seconds within a request."""


class ReportReceiver:
    """The newest report of a training."""

    def __init__(self, namespace: str, name: str) -> None:
        """Open a port of the loopback interface for the reports of a job. Nothing is read before `listening`."""
        self.token = secrets.token_urlsafe(32)
        """The token that the reports must have."""
        self._lock = threading.Lock()
        self._newest: Report | None = None
        self._path = report_path(namespace, name, 1)
        self._server = ThreadingHTTPServer((LOOPBACK, 0), self._handler())

    @property
    def config(self) -> ReportConfig:
        """Where the trainer posts its reports, and how often."""
        url = f"http://{LOOPBACK}:{self._server.server_address[1]}{self._path}"
        return ReportConfig(url=url, interval_seconds=INTERVAL_SECONDS)

    @property
    def newest(self) -> Report | None:
        """The newest report; None before the first one."""
        with self._lock:
            return self._newest

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take reports while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, name="reports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _take(self, authorization: str, body: bytes) -> HTTPStatus:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self.token}".encode()):
            return HTTPStatus.UNAUTHORIZED
        try:
            report = Report.model_validate_json(body)
        except ValidationError:
            return HTTPStatus.BAD_REQUEST
        with self._lock:
            self._newest = report
        return HTTPStatus.NO_CONTENT

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_POST(self) -> None:
                """Take one report."""
                length = self.headers.get("Content-Length", "")
                if self.path != receiver._path or not length.isdecimal() or int(length) > REPORT_LIMIT_BYTES:
                    self.close_connection = True
                    self._answer(HTTPStatus.BAD_REQUEST)
                    return
                self._answer(receiver._take(self.headers.get("Authorization", ""), self.rfile.read(int(length))))

            def _answer(self, status: HTTPStatus) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (as in the base class)
                """Write nothing: the terminal belongs to the progress bar."""

        return Handler
