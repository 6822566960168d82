"""An asynchronous client of the API server with administrator rights, for the tests themselves."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import aiohttp

from tests.cluster import Cluster
from tests.cluster.layout import API_URL

Manifest = dict[str, Any]
RETRY_SECONDS = 0.3
BUSY_SECONDS = 30.0
"""Longest time for which a request is sent again while the API server answers 429."""
MERGE_PATCH = "application/merge-patch+json"


class RefusedError(Exception):
    """The API server answered with an HTTP status of 300 or more."""

    def __init__(self, status: int, text: str) -> None:
        """Keep the HTTP ``status``; ``text`` is the beginning of the answer's body, for the message."""
        super().__init__(f"{status} {text}")
        self.status = status


def admin_context(cluster: Cluster) -> ssl.SSLContext:
    """Return a TLS context with the client certificate of the administrator."""
    pki = cluster.layout.certificates
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "administrator.crt", pki / "administrator.key")
    return context


class Admin:
    """Sends requests as administrator. All calls must come from one event loop."""

    def __init__(self, context: ssl.SSLContext, *, connections: int = 32) -> None:
        """Prepare a client without opening a connection. Later the client has at most ``connections`` open connections
        at a time."""
        connector = aiohttp.TCPConnector(limit=connections, ssl=context)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(API_URL, connector=connector, timeout=timeout, read_bufsize=4 * 1024**2)

    async def close(self) -> None:
        """Close all connections to the API server."""
        await self._session.close()

    async def call(
        self, method: str, path: str, body: Manifest | None = None, *, content_type: str = "application/json"
    ) -> Manifest:
        """Send one request and return the decoded answer.

        While the API server answers 429, as it does for some seconds after a change of a CRD ("storage is
        (re)initializing"), the request is sent again after the time for which the server asks, for at most
        `BUSY_SECONDS`.

        Raises:
            RefusedError: the answer has a status of 300 or more.
        """
        data = json.dumps(body) if body is not None else None
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            async with self._session.request(
                method, path, data=data, headers={"Content-Type": content_type}, timeout=aiohttp.ClientTimeout(total=30)
            ) as response:
                text = await response.text()
                if response.status == HTTPStatus.TOO_MANY_REQUESTS and time.monotonic() < deadline:
                    await asyncio.sleep(float(response.headers.get("Retry-After", RETRY_SECONDS)))
                    continue
                if response.status >= 300:
                    raise RefusedError(response.status, text[:500])
                answer: Manifest = json.loads(text)
                return answer

    async def list_all(self, path: str) -> list[Manifest]:
        """Return all items of the collection at ``path``."""
        items: list[Manifest] = (await self.call("GET", path))["items"]
        return items

    async def watch(self, path: str) -> AsyncIterator[Manifest]:
        """Yield watch events of the collection at ``path``, without end.

        Existing objects come first as ``ADDED`` events. When the stream ends or breaks off, and after an ``ERROR``
        event, the existing objects come again in the same way.
        """
        while True:
            try:
                listed = await self.call("GET", path)
                for item in listed["items"]:
                    yield {"type": "ADDED", "object": item}
                version = listed["metadata"]["resourceVersion"]
                separator = "&" if "?" in path else "?"
                async with self._session.get(f"{path}{separator}watch=true&resourceVersion={version}") as stream:
                    async for line in stream.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        yield event
            except (aiohttp.ClientError, RefusedError, TimeoutError, ConnectionError):
                await asyncio.sleep(RETRY_SECONDS)
