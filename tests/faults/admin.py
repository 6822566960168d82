"""The API server for a test's own hands: an asynchronous client as the cluster's administrator."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from tests.cluster import Cluster
from tests.cluster.layout import API_URL

Manifest = dict[str, Any]
RETRY_SECONDS = 0.3
MERGE_PATCH = "application/merge-patch+json"


class RefusedError(Exception):
    """The API server answered with something else than success."""

    def __init__(self, status: int, text: str) -> None:
        """Keep the HTTP ``status``."""
        super().__init__(f"{status} {text}")
        self.status = status


def admin_context(cluster: Cluster) -> ssl.SSLContext:
    """Return the TLS context of the administrator."""
    pki = cluster.layout.certificates
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "administrator.crt", pki / "administrator.key")
    return context


class Admin:
    """Requests as administrator; made and used inside one event loop."""

    def __init__(self, context: ssl.SSLContext, *, connections: int = 32) -> None:
        """Open no connection yet."""
        connector = aiohttp.TCPConnector(limit=connections, ssl=context)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(API_URL, connector=connector, timeout=timeout, read_bufsize=4 * 1024**2)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def call(
        self, method: str, path: str, body: Manifest | None = None, *, content_type: str = "application/json"
    ) -> Manifest:
        """Send one request and return the answer; raises RefusedError."""
        data = json.dumps(body) if body is not None else None
        async with self._session.request(
            method, path, data=data, headers={"Content-Type": content_type}, timeout=aiohttp.ClientTimeout(total=30)
        ) as response:
            text = await response.text()
            if response.status >= 300:
                raise RefusedError(response.status, text[:500])
            answer: Manifest = json.loads(text)
            return answer

    async def list_all(self, path: str) -> list[Manifest]:
        """Return the items of a collection."""
        items: list[Manifest] = (await self.call("GET", path))["items"]
        return items

    async def watch(self, path: str) -> AsyncIterator[Manifest]:
        """Yield what exists and then what changes, over every break of the connection, for ever.

        Objects come as ``ADDED``, ``MODIFIED`` or ``DELETED`` events; after a break what exists comes again.
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
