"""Accepts the connections of an HTTP server and bounds what clients may take: connections, time and bytes.

Every pod of the cluster can connect to the operator's servers without a credential. So a connection costs little
memory and is closed when its client does nothing. Where there are too many connections, an idle connection is closed in
favour of a new one.
`http_server.py` runs a `Listener`; aiohttp speaks HTTP on the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
import ssl
from asyncio import sslproto
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Final, cast

from finetune_operator.process.rate_limit import RateLimiter

logger = logging.getLogger(__name__)

TLS_BUFFER_BYTES: Final = 8 * 1024
"""Size of the buffer in which asyncio receives the data of a TLS connection, also of the operator's own connections to
the API server. A large record of TLS, which may have 16 KiB, then takes several reads."""
SEND_BUFFER_BYTES: Final = 64 * 1024
"""Size of the buffer in which the kernel keeps what a client has not received yet. The kernel reserves twice this size.
Without a fixed size the buffer would grow to several megabytes for a client that does not read, and would count as
memory of the container."""
SHUTDOWN_SECONDS: Final = 2.0
"""Time in seconds within which a client must answer the end of a TLS connection. After this time the connection is
closed without the answer."""
FILES_LEFT: Final = 512
"""Number of file descriptors that the connections of one server leave to the rest of the process. Of what the report
server leaves, the connections of the health server take 256 at most. The rest is for the process itself, for example
for its connections to the API server."""
ACCEPT_RETRY_SECONDS: Final = 1.0
"""Seconds to wait before connections are accepted again, after the system lacked a file descriptor or memory for a
connection."""
BACKLOG: Final = 128
_ALL: Final = "all"
"""Key of the one token bucket that limits the new connections of all addresses together."""
_END_OF_HEADER: Final = b"\r\n\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """Limits on the connections, the requests, the bytes and the time of a server's clients.

    One address may make ``per_address / 2`` new connections per second on average, and ``2 * per_address`` in a burst.
    """

    connections: int = 2000
    """Largest number of connections in all."""
    per_address: int = 64
    """Largest number of connections of one address. An IPv6 address means its /64 network, which one machine may own as
    a whole."""
    handshake_seconds: float = 5.0
    """Time for the TLS handshake."""
    header_seconds: float = 5.0
    """Time from the first byte of a request to the end of its header. For the first request of a connection, the time
    runs from the end of the TLS handshake (without TLS: from the beginning of the connection)."""
    header_bytes: int = 16 * 1024
    """Largest number of bytes of a request's header, with its first line."""
    request_bytes: int = 256 * 1024
    """Largest number of bytes that a client may send before its request is answered. Bytes of further requests count
    too."""
    request_seconds: float = 60.0
    """Time from the end of a request's header until the answer is ready to be sent. Within this time, reading the body
    (`reports/server.py`) and each request to the API server (`kube/client.py`) have shorter limits."""
    idle_seconds: float = 30.0
    """Time from the moment when an answer is ready until the first byte of the connection's next request. The answer is
    sent within this time, so a client that reads too slowly does not get the whole answer."""
    requests_per_second: float = 64.0
    """Largest number of requests per second of one address, on average. A burst may have four times as many."""
    handshakes_per_second: float = 100.0
    """Largest number of new connections per second of all addresses, on average. A burst may have five times as many.
    The number is limited because a TLS handshake costs a few milliseconds of CPU time."""


def client_of(address: str) -> str:
    """Return what the limits on one address count as one client: an IPv4 address, or the /64 network of an IPv6
    address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((parsed, 64), strict=False))
        parsed = parsed.ipv4_mapped
    return str(parsed)


class Connection(asyncio.Protocol):
    """One connection of a client. Hands the data to an HTTP protocol, and ends the connection at its deadlines."""

    def __init__(self, inner: asyncio.Protocol, client: str, limits: ConnectionLimits, listener: Listener) -> None:
        """Hand data to ``inner``, the HTTP protocol. ``client`` is what `client_of` returns for the client's address.

        asyncio ends a TLS handshake that takes too long. This class ends the connection at the other deadlines of
        ``limits``. The connection informs ``listener`` whether it is busy, idle or lost.
        """
        self.client = client
        self.task: asyncio.Task[None] | None = None
        """The task of the handshake."""
        self._inner = inner
        self._limits = limits
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._in_header = True
        self._begun = False
        self._received = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note that the handshake is done, and limit the time for the header of the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._listener.by_transport[transport] = self
        self._begun = True
        self._end_after(self._limits.header_seconds)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of the header and of the whole request, and hand the data on. Above a limit, end the
        connection."""
        if not self._begun:
            self._begun = True
            self._end_after(self._limits.header_seconds)
        header = self._received + self._header_bytes(data)
        self._received += len(data)
        if header > self._limits.header_bytes or self._received > self._limits.request_bytes:
            self.end()
        else:
            self._inner.data_received(data)

    def _header_bytes(self, data: bytes) -> int:
        """Return how many bytes of ``data`` belong to the header of a request, and note it if the header ends in them.

        The caller adds the number of bytes that were received before ``data`` to the result, and compares the sum with
        the limit of a header. Once the header has ended, the result is the negative of that number, so that the sum is
        0.
        """
        if not self._in_header:
            return -self._received
        # Line ends before the first line of a request, which HTTP servers skip, must not look like the end of a header.
        window = self._tail + data if self._tail else data.lstrip(b"\r\n")
        end = window.find(_END_OF_HEADER)
        self._tail = window[-len(_END_OF_HEADER) + 1 :]
        if end < 0:
            return len(data)
        self._in_header = False
        return len(data) - (len(window) - end - len(_END_OF_HEADER))

    def request_started(self) -> None:
        """Note that a request is being answered, so that the connection is not idle. Limit the time for the answer."""
        self._in_header = False
        self._listener.is_busy(self)
        self._end_after(self._limits.request_seconds)

    def request_finished(self) -> None:
        """Note that the answer is known and the next request may come, and limit the time until it comes."""
        self._in_header, self._begun, self._received, self._tail = True, False, 0, b""
        self._listener.is_idle(self)
        self._end_after(self._limits.idle_seconds)

    def eof_received(self) -> bool | None:
        """Inform the HTTP protocol that the client sends nothing more."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Inform the HTTP protocol that the client does not read fast enough."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Inform the HTTP protocol that the client reads again."""
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._transport is not None:
            self._listener.by_transport.pop(self._transport, None)
            self._inner.connection_lost(exc)
        self._listener.forget(self)

    def end(self) -> None:
        """Close the connection at once, whatever its client does."""
        if self._transport is not None:
            self._transport.abort()
        elif self.task is not None:
            # The task takes its first step before it is cancelled. Otherwise the socket of the connection would stay
            # open until the next full garbage collection.
            asyncio.get_running_loop().call_soon(self.task.cancel)
        self._listener.forget(self)

    def _end_after(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.end)


class Listener:
    """Accepts connections on one port within limits.

    Where a new connection would exceed the limit of its address, the connection of that address that has been idle for
    longest is closed. Where a new connection would exceed the limit of all addresses, the connection that has been idle
    for longest of all is closed. Where no connection is idle that could be closed, the new connection is closed at
    once.
    """

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        limits: ConnectionLimits,
        context: ssl.SSLContext | None,
    ) -> None:
        """Prepare to accept connections, with TLS where ``context`` is given.

        ``make_protocol`` returns a new HTTP protocol, to which a connection hands its data.
        """
        if context is not None:
            # asyncio has no public setting for the size of the buffer in which it receives the data of a TLS
            # connection. By default the buffer has 256 KiB for each connection.
            sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
        self.by_transport: dict[asyncio.BaseTransport, Connection] = {}
        """The connections whose handshake is done, by the transport that a request names."""
        self._make_protocol = make_protocol
        self._limits = limits
        self._context = context
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = limits.connections
        if files != resource.RLIM_INFINITY:
            self._most = max(1, min(self._most, files - FILES_LEFT))
        self._handshakes = RateLimiter(limits.handshakes_per_second, 5 * limits.handshakes_per_second)
        self._by_client = RateLimiter(limits.per_address / 2, 2 * limits.per_address)
        self._clients: dict[str, dict[Connection, None]] = {}
        self._idle: dict[Connection, None] = {}  # the connection that has been idle for longest comes first
        self._count = 0
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return the number of connections."""
        return self._count

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return int(self._sockets[0].getsockname()[1])

    def start(self, port: int, address: str) -> None:
        """Listen on ``port`` of the IP address ``address``; an empty ``address`` means all IPv4 and IPv6 addresses."""
        self._sockets = [_listening(address, port)] if address else _listening_everywhere(port)
        for listening in self._sockets:
            self._keep(self._accept_forever(listening))

    async def stop(self) -> None:
        """Accept nothing more, and end all handshakes. The HTTP server ends the other connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()

    def is_busy(self, connection: Connection) -> None:
        """Note that the connection has a request, so that it is not closed in favour of a newer connection."""
        self._idle.pop(connection, None)

    def is_idle(self, connection: Connection) -> None:
        """Note that the connection waits for its client from now on."""
        self._idle.pop(connection, None)
        if connection in self._clients.get(connection.client, ()):
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """Note that the connection has ended."""
        self._idle.pop(connection, None)
        own = self._clients.get(connection.client, {})
        if connection in own:
            del own[connection]
            self._count -= 1
        if not own:
            self._clients.pop(connection.client, None)

    async def _accept_forever(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listening)
            except OSError as error:
                logger.warning("no connection can be accepted at the moment: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            self._admit(accepted, client_of(str(peer[0])))
            # `sock_accept` does not yield while connections are pending. Without this line, a client that connects
            # without a pause would keep the event loop to itself.
            await asyncio.sleep(0)

    def _admit(self, accepted: socket.socket, client: str) -> None:
        """Serve the connection ``accepted``, or close it where new connections come too fast or no room can be made."""
        if not (self._by_client.allows(client) and self._handshakes.allows(_ALL) and self._make_room(client)):
            accepted.close()
            return
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection = Connection(self._make_protocol(), client, self._limits, self)
        self._clients.setdefault(client, {})[connection] = None
        self._count += 1
        self._idle[connection] = None
        connection.task = self._keep(self._connect(connection, accepted))

    def _make_room(self, client: str) -> bool:
        """Return whether there is room for one more connection of ``client``. If needed, close an idle connection."""
        if len(self._clients.get(client, {})) >= self._limits.per_address:
            return _end_first(connection for connection in self._idle if connection.client == client)
        return self._count < self._most or _end_first(self._idle)

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        """Do the TLS handshake, if the listener uses TLS, and connect ``connection`` with the socket ``accepted``.

        The client may break off at any time, which is no error of the server.
        """
        secure = self._context is not None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.handshake_seconds if secure else None,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS if secure else None,
            )
        except OSError as error:  # also ssl.SSLError, and the ConnectionError of a handshake that takes too long
            logger.debug("a connection failed: %s", error)
            self.forget(connection)
        except asyncio.CancelledError:
            self.forget(connection)
            raise
        finally:
            connection.task = None

    def _keep(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run ``coroutine`` as a task, and keep a reference to the task while it runs."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _end_first(connections: Iterable[Connection]) -> bool:
    """End the first of ``connections``; return False where there is none."""
    for connection in connections:
        connection.end()
        return True
    return False


def _listening(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.create_server((address, port), family=family, backlog=BACKLOG)
    made.setblocking(False)
    return made


def _listening_everywhere(port: int) -> list[socket.socket]:
    """Return a listening socket for IPv4, and a second socket for IPv6 where this machine has IPv6."""
    sockets = [_listening("0.0.0.0", port)]  # noqa: S104  (probes and Prometheus come from other machines)
    if socket.has_ipv6:
        with contextlib.suppress(OSError):  # the kernel has IPv6 switched off
            sockets.append(_listening("::", port))
    return sockets
