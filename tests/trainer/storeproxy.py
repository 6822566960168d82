"""An HTTP/1.1 proxy that injects faults into the connections to a real object store, because a healthy store has none.

The proxy counts the requests. For each request the proxy calls the test's plan, a function that returns None (forward
the request) or a fault: answer with an error, cut the connection before, during or after the request or during the
answer, hang, or flip a bit. The proxy can also throttle the transfer or refuse all connections. The proxy runs in a
thread of the test process, and the trainer sees an ordinary endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import unquote, urlsplit

CHUNK = 16 * 1024


class Fault(Enum):
    """A fault that the proxy injects into one request. The value describes what happens."""

    ERROR = "500 without a word"
    SLOW_DOWN = "503 SlowDown"
    DENIED = "403 AccessDenied"
    RESET_BEFORE = "the connection breaks before the store hears of it"
    RESET_AFTER = "the store acts, its answer is lost"
    CUT_UPLOAD = "the connection breaks in the middle of the body"
    HANG = "no answer until the proxy is released"
    FLIP_UPLOAD = "a bit of the body changes on its way to the store"
    FLIP_DOWNLOAD = "a bit of the answer's body changes on its way back"
    CUT_DOWNLOAD = "the answer's body ends early"


@dataclass(frozen=True)
class Request:
    """A request that the proxy received."""

    index: int
    """Number of the request in the order of arrival, counted from 0."""
    method: str
    path: str
    """Bucket, key and query of the request, percent-decoded."""
    fields: Mapping[str, str] = field(repr=False, compare=False)
    """HTTP headers of the request, with names in lower case."""


@dataclass
class _Head:
    start: str
    fields: dict[str, str]
    raw: bytes

    @property
    def length(self) -> int | None:
        return int(self.fields["content-length"]) if "content-length" in self.fields else None


def pass_all(request: Request) -> Fault | None:
    """A plan without faults: every request is forwarded."""
    return None


@dataclass
class StoreProxy:
    """A running proxy. A test may change the fields at any time from its own thread."""

    endpoint: str
    plan: Callable[[Request], Fault | None] = pass_all
    bytes_per_second: float | None = None
    """Limit of the bandwidth, which all connections and both directions share. None means no limit."""
    down: bool = False
    """While true, new connections are closed at once, and existing ones at their next request or chunk, without an
    answer."""
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    """While this event is not set, hanging requests wait. Once the event is set, the connections of these requests are
    closed."""
    _upstream: tuple[str, int] = ("", 0)
    _free_at: float = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward the requests of one client connection."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while not self.down:
                head = await _read_head(reader)
                if head is None or self.down:
                    return
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
                if not await self._exchange(head, reader, writer, *upstream):
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            for stream in (writer, upstream[1] if upstream else None):
                if stream is not None:
                    stream.transport.abort() if self.down else stream.close()

    async def _exchange(
        self,
        head: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        store: asyncio.StreamReader,
        to_store: asyncio.StreamWriter,
    ) -> bool:
        """Ask the plan for a fault, and forward one request and its response.

        Return whether the connection stays open.
        """
        method, target, _ = head.start.split(" ", 2)
        request = Request(len(self.requests), method, unquote(target), head.fields)
        self.requests.append(request)
        fault = self.plan(request)
        if fault is Fault.RESET_BEFORE:
            writer.transport.abort()
            return False
        if fault is Fault.HANG:
            while not self.released.is_set():
                await asyncio.sleep(0.05)
            writer.transport.abort()
            return False
        if fault in (Fault.ERROR, Fault.SLOW_DOWN, Fault.DENIED):
            await reader.readexactly(head.length or 0)
            writer.write(_error(fault))
            await writer.drain()
            return True
        length = head.length or 0
        if fault is Fault.CUT_UPLOAD and length:
            to_store.write(head.raw + await reader.readexactly(length // 2))
            await to_store.drain()
            to_store.transport.abort()
            writer.transport.abort()
            return False
        to_store.write(head.raw)
        await self._copy(reader, to_store, length, flip=fault is Fault.FLIP_UPLOAD)
        answer = await _read_head(store)
        if answer is None or fault is Fault.RESET_AFTER:
            writer.transport.abort()
            return False
        return await self._answer(method, answer, store, writer, fault)

    async def _answer(
        self, method: str, answer: _Head, store: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault | None
    ) -> bool:
        writer.write(answer.raw)
        status = int(answer.start.split(" ")[1])
        if method == "HEAD" or status in (204, 304):
            await writer.drain()
            return True
        if answer.fields.get("transfer-encoding") == "chunked":
            while True:
                size = await store.readline()
                length = int(size.strip().split(b";")[0], 16)
                writer.write(size + await store.readexactly(length + 2))
                await writer.drain()
                if length == 0:
                    return True
        length = answer.length or 0
        if fault is Fault.CUT_DOWNLOAD and length:
            writer.write(await store.readexactly(length // 2))
            await writer.drain()
            writer.transport.abort()
            return False
        await self._copy(store, writer, length, flip=fault is Fault.FLIP_DOWNLOAD)
        return True

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, length: int, *, flip: bool
    ) -> None:
        """Copy ``length`` bytes, not faster than `bytes_per_second`. ``flip`` inverts one bit in the middle."""
        done = 0
        while done < length:
            chunk = bytearray(await source.readexactly(min(CHUNK, length - done)))
            if flip and done <= length // 2 < done + len(chunk):
                chunk[length // 2 - done] ^= 1
            done += len(chunk)
            target.write(bytes(chunk))
            await target.drain()
            if self.bytes_per_second:
                now = time.monotonic()
                self._free_at = max(now, self._free_at) + len(chunk) / self.bytes_per_second
                await asyncio.sleep(self._free_at - now)
            if self.down:
                raise ConnectionAbortedError
        await target.drain()


async def _read_head(reader: asyncio.StreamReader) -> _Head | None:
    """Read the head of a request or response, or return None if the connection has ended."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    start, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return _Head(start, fields, raw)


def _error(fault: Fault) -> bytes:
    """Return the HTTP response that the proxy sends for the fault ERROR, SLOW_DOWN or DENIED."""
    if fault is Fault.SLOW_DOWN:
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
        # Retry-After is here because MinIO adds it to every response with status 503.
        line = "503 Service Unavailable\r\nRetry-After: 60"
    elif fault is Fault.DENIED:
        body, line = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>", "403 Forbidden"
    else:
        body, line = b"", "500 Internal Server Error"
    head = f"HTTP/1.1 {line}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def proxy_before(endpoint: str) -> Iterator[StoreProxy]:
    """Run a proxy in front of ``endpoint`` on a free port while the block runs."""
    parts = urlsplit(endpoint)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    proxy = StoreProxy(
        f"http://127.0.0.1:{listener.getsockname()[1]}", _upstream=(parts.hostname or "", parts.port or 80)
    )
    started, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()

    async def run() -> None:
        async with await asyncio.start_server(proxy.serve, sock=listener, limit=1 << 20):
            started.set()
            await ended.wait()
        proxy.released.set()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="store-proxy", daemon=True)
    thread.start()
    if not started.wait(10):
        raise TimeoutError("the proxy did not start within 10 s")
    try:
        yield proxy
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)
        thread.join(10)
