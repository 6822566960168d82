"""API clients that keep a former leader from writing.

Right before a write is sent, a callback (the fence) checks that this process still holds the Lease. When the process
ends, the kernel discards data that the server has not acknowledged, because of the socket options set here. So no write
arrives after another replica became leader. `client.py` uses the fenced client, `application.py` the Lease client.
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
"""After this time without a TCP acknowledgement the kernel discards the unacknowledged data and closes the connection.
`process/leader_election.py` leaves as much time between the end of a leader that can't renew its Lease and the start of
the next leader."""
_DROP_AT_CLOSE: Final = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""Value of SO_LINGER, `struct linger {1, 0}`: closing the socket discards unsent data and resets the connection."""
_READS: Final = frozenset({"GET", "HEAD"})


def short_lived_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a TCP socket whose data is acknowledged within five seconds or discarded.

    ``address`` is an entry that `socket.getaddrinfo` returns.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP_AT_CLOSE)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
    return made


class _ShortLivedConnections(RESTClientObject):  # type: ignore[misc]
    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=short_lived_socket)


def fenced_client(configuration: Any, fence: Callable[[], None]) -> Any:
    """Return an API client that calls ``fence`` right before every write.

    ``fence`` must end the process where this process is no longer the leader.
    """
    client = ApiClient(configuration)
    client.rest_client = _ShortLivedConnections(_with_fence(_without_environment(configuration), fence))
    return client


def lease_client(configuration: Any) -> Any:
    """Return an API client for the Lease.

    This client has no fence, because a candidate that is not the leader writes the Lease to become the leader.
    """
    client = ApiClient(configuration)
    client.rest_client = _ShortLivedConnections(_without_environment(configuration))
    return client


def _without_environment(configuration: Any) -> Any:
    """Return a copy of ``configuration`` with which HTTP sessions ignore proxy variables and `.netrc`.

    aiohttp would otherwise look both up in a thread before every request. kopf's watches ignore both as well.
    """
    copied = copy.copy(configuration)
    copied.client_session_kwargs = {"trust_env": False}
    return copied


def _with_fence(configuration: Any, fence: Callable[[], None]) -> Any:
    """Return a copy of ``configuration`` with which HTTP sessions call ``fence`` right before a write is sent.

    ``fence`` is called once the write has its connection, because the wait for a connection may be long.
    """
    trace = aiohttp.TraceConfig()

    async def request_started(
        _session: aiohttp.ClientSession, context: SimpleNamespace, request: aiohttp.TraceRequestStartParams
    ) -> None:
        context.writes = request.method not in _READS

    async def connected(_session: aiohttp.ClientSession, context: SimpleNamespace, _connection: object) -> None:
        if context.writes:
            fence()

    trace.on_request_start.append(request_started)
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    copied = copy.copy(configuration)
    copied.trace_configs = [trace]
    return copied
