"""Connections to the API server that can't carry a write of a former leader.

A write is checked against the Lease at the last moment, when its connection is there. What a process that ends has
sent and the server has not taken is thrown away by the kernel, not delivered later, after another leader began.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.rest import RESTClientObject

UNACKNOWLEDGED_MILLISECONDS: Final = 5000
"""Time between the end of a leader that can't renew and the beginning of the next one: see `leadership`."""
_DROP_AT_CLOSE: Final = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""struct linger {1, 0}: closing discards what was not sent and resets the connection."""
_READS: Final = frozenset({"GET", "HEAD"})


def short_lived_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a TCP socket whose data is delivered within five seconds or never. ``address`` as of getaddrinfo."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP_AT_CLOSE)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
    return made


class _Connections(RESTClientObject):  # type: ignore[misc]
    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=short_lived_socket)


def fenced_client(configuration: Any, fence: Callable[[], None]) -> Any:
    """Return an API client that calls ``fence`` right before every write; it ends the process or returns."""
    client = ApiClient(configuration)
    client.rest_client = _Connections(_with_trace(_direct(configuration), fence))
    return client


def lease_client(configuration: Any) -> Any:
    """Return an API client for the Lease itself: a candidate must write it to become leader."""
    client = ApiClient(configuration)
    client.rest_client = _Connections(_direct(configuration))
    return client


def _direct(configuration: Any) -> Any:
    """Return a copy of ``configuration`` whose sessions look for no proxy and no `.netrc` in the environment.

    The client looks for both in threads of their own before every request; kopf's watches do not look at all.
    """
    copied = copy.copy(configuration)
    copied.client_session_kwargs = {"trust_env": False}
    return copied


def _with_trace(configuration: Any, fence: Callable[[], None]) -> Any:
    """Return a copy of ``configuration`` whose sessions ask ``fence`` once a write has its connection."""
    trace = aiohttp.TraceConfig()

    async def begins(
        _session: aiohttp.ClientSession, context: SimpleNamespace, request: aiohttp.TraceRequestStartParams
    ) -> None:
        context.writes = request.method not in _READS

    async def connected(_session: aiohttp.ClientSession, context: SimpleNamespace, _connection: object) -> None:
        if context.writes:
            fence()

    trace.on_request_start.append(begins)
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    copied = copy.copy(configuration)
    copied.trace_configs = [trace]
    return copied
