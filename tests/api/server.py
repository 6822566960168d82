"""Sends jobs to the real API server with strict field validation, and returns the server's answers.

A job or an update is sent as JSON text. The answer has the status code, and the object that the server would store or
the reason why it refuses the request. By default `create` and `update` are dry runs: the server fills in defaults and
validates the object, but stores nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from kubernetes import config

from finetune_core.api.job import GROUP, PLURAL, VERSION
from tests.cluster import Cluster

NAMESPACE = "agreement"
PATH = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The API server's answer to a request."""

    status: int
    body: dict[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether the server accepts the object. A 5xx status fails the test."""
        assert self.status < 500, self.body
        return self.status < 300

    @property
    def spec(self) -> dict[str, Any]:
        """The spec of the object in the answer. In a dry run it is what the server would store."""
        spec: dict[str, Any] = self.body["spec"]
        return spec

    @property
    def message(self) -> str:
        """The text with which the server refuses an object. `kubectl apply` prints it."""
        return str(self.body.get("message", ""))


class Server:
    """Sends requests to the API server from a thread of its own. Only this thread has to be in the cluster's network.
    The thread of the tests stays outside."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._inside = threading.local()
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=self._enter)

    def _enter(self) -> None:
        self._inside.network = self._cluster.enter()
        self._inside.network.__enter__()
        client = config.new_client_from_config(config_file=str(self._cluster.kubeconfig))
        self._inside.pool = client.rest_client.pool_manager
        self._inside.host = client.configuration.host

    def close(self) -> None:
        """Leave the cluster's network and end the thread."""
        self._thread.submit(lambda: self._inside.network.__exit__(None, None, None)).result()
        self._thread.shutdown()

    def _do(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def create(self, text: str, *, keep: bool = False) -> Answer:
        """Create a job (POST). Without ``keep`` it is a dry run."""
        dry = "" if keep else "&dryRun=All"
        return self._send("POST", f"{PATH}?fieldValidation=Strict{dry}", text, "application/json")

    def update(self, name: str, text: str, *, keep: bool = False) -> Answer:
        """Replace the stored job ``name`` (PUT). Without ``keep`` it is a dry run."""
        dry = "" if keep else "&dryRun=All"
        return self._send("PUT", f"{PATH}/{name}?fieldValidation=Strict{dry}", text, "application/json")

    def read(self, name: str) -> Answer:
        """Read the stored job ``name`` (GET)."""
        return self._send("GET", f"{PATH}/{name}", None, "application/json")

    def remove(self, name: str) -> Answer:
        """Delete the stored job ``name``."""
        return self._send("DELETE", f"{PATH}/{name}", None, "application/json")

    def _send(self, method: str, path: str, text: str | None, kind: str) -> Answer:
        def send() -> Answer:
            body = text.encode() if text is not None else None
            url = f"{self._inside.host}{path}"
            response = self._inside.pool.request(method, url, body=body, headers={"Content-Type": kind}, timeout=60)
            return Answer(response.status, json.loads(response.data))

        return self._do(send)
