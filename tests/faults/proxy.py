"""HTTPS proxy between the operator and the real API server. The proxy injects the faults of `rules.py`.

The proxy forwards requests, streams watches line by line, and records every request with its status. The proxy can also
kill the operator right after a chosen write. The proxy uses the API server's own certificate. The only setting that the
operator needs for the proxy is another URL of the API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET

import aiohttp
from aiohttp import web

from tests.cluster.layout import API_URL
from tests.faults.rules import (
    WRITES,
    Answer,
    CutWatch,
    Delay,
    Drop,
    EditEvents,
    Event,
    Fault,
    Request,
    Reset,
    Rule,
    ServeOld,
    StreamError,
)

_HOP_HEADERS = {"connection", "host", "content-length", "transfer-encoding", "keep-alive", "accept-encoding"}
_LARGEST_BODY = 16 * 1024**2
_WATCH_LINE = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Record:
    """A request, and the HTTP status that the operator got. The status is 0 where the operator got no answer."""

    at: float
    """Time on the monotonic clock at which the proxy answered the request, or decided not to answer it."""
    request: Request
    status: int

    @property
    def wrote(self) -> bool:
        """Whether the request is a create, update, patch or delete, and the operator got the answer that the request
        succeeded."""
        return self.request.verb in WRITES and 200 <= self.status < 300


@dataclass
class Kill:
    """An order to kill the operator right after the ``number``-th successful write in ``namespace``, counted from 1."""

    number: int
    victim: Callable[[], int | None]
    """Returns the operator's process id, or None where no operator runs."""
    namespace: str = ""
    """Only writes in this namespace are counted; if empty, all writes are counted."""
    tell: bool = False
    """Whether the proxy sends the API server's answer before it kills the operator, so that the operator may have read
    the answer. If False, the answer is never sent."""
    writes: int = field(default=0, init=False)
    done: bool = field(default=False, init=False)
    """Whether the ``number``-th write has happened."""
    struck: bool = field(default=False, init=False)
    """Whether this order killed a running operator. False until write ``number`` has happened, and False if another
    `Kill` had already ended the operator."""

    def is_due(self, request: Request) -> bool:
        """Count ``request``, a successful write, if it is in `namespace`. Return True if it is write number `number`,
        after which the operator must be killed."""
        if self.done or (self.namespace and request.namespace != self.namespace):
            return False
        self.writes += 1
        self.done = self.writes >= self.number
        return self.done


class FaultProxy:
    """The proxy. It runs in one event loop; `rules` and `kills` may be replaced from any thread."""

    def __init__(self, *, server: ssl.SSLContext, client: ssl.SSLContext, target: str = API_URL) -> None:
        """Serve with the TLS context ``server``, and forward to ``target`` with the TLS context ``client``."""
        self.rules: list[Rule] = []
        self.kills: list[Kill] = []
        self.records: list[Record] = []
        self.port = 0
        self._server_context = server
        self._client_context = client
        self._target = target
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._watches: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """Listen on 127.0.0.1. A second `start` after `stop` uses the same port."""
        connector = aiohttp.TCPConnector(limit=0, ssl=self._client_context)
        # The proxy does not ask the API server for compressed answers, because it must read the lines of watches.
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            read_bufsize=_WATCH_LINE,
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=["Accept-Encoding", "User-Agent"],
        )
        application = web.Application(client_max_size=_LARGEST_BODY)
        application.router.add_route("*", "/{path:.*}", self._handle)
        # With `handler_cancellation`, the handler of a request is cancelled when the client closes the connection. So a
        # watch ends at this moment. `_handle` protects all other forwarded requests from the cancellation.
        self._runner = web.AppRunner(
            application, handle_signals=False, access_log=None, shutdown_timeout=0, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._server_context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening, so that connections are refused, and close the open connections."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    @contextlib.contextmanager
    def fault(self, *rules: Rule) -> Iterator[None]:
        """Apply ``rules`` during the block."""
        self.rules = [*self.rules, *rules]
        try:
            yield
        finally:
            self.rules = [rule for rule in self.rules if rule not in rules]

    async def end_watches(self) -> None:
        """Reset every open watch, so that the rules apply to the watches that the operator opens next."""
        for watch in self._watches:
            watch.cancel()

    # ---- handling of one request ----

    async def _handle(self, incoming: web.Request) -> web.StreamResponse:
        request = Request.of(incoming.method, incoming.path, incoming.query)
        fault = next((rule.fault for rule in self.rules if rule.takes(request)), None)
        if isinstance(fault, Delay):
            await asyncio.sleep(fault.seconds)
        elif isinstance(fault, Answer):
            return self._answer(request, fault)
        elif isinstance(fault, Drop):
            self._note(request, 0)
            await asyncio.Event().wait()  # Wait until the client closes the connection after its own time-out.
        elif isinstance(fault, Reset) and not fault.carried_out:
            self._note(request, 0)
            return self._reset(incoming)
        if request.verb == "watch":
            return await self._watch(incoming, request, fault)
        return await asyncio.shield(asyncio.ensure_future(self._forward(incoming, request, fault)))

    def _answer(self, request: Request, fault: Answer) -> web.Response:
        self._note(request, fault.status)
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": fault.status,
            "reason": fault.reason,
            "message": f"{fault.reason or fault.status} by the proxy",
        }
        return web.json_response(status, status=fault.status, headers=fault.headers)

    async def _forward(self, incoming: web.Request, request: Request, fault: Fault | None) -> web.StreamResponse:
        body = await incoming.read()
        try:
            async with self._upstream(incoming, fault, body) as response:
                content = await response.read()
        except aiohttp.ClientError:
            # The API server is unreachable, so the proxy resets the operator's connection.
            self._note(request, 0)
            return self._reset(incoming)
        killer = self._killer(request, response.status)
        if killer is not None and not killer.tell:
            self._note(request, 0)
            _kill(killer)
            return self._reset(incoming)
        if isinstance(fault, Reset):
            self._note(request, 0)
            return self._reset(incoming)
        self._note(request, response.status)
        headers = {"Content-Type": response.headers.get("Content-Type", "application/json")}
        answer = web.Response(status=response.status, body=content, headers=headers)
        if killer is not None:
            await answer.prepare(incoming)
            await answer.write_eof()
            _kill(killer)
        return answer

    def _killer(self, request: Request, status: int) -> Kill | None:
        if request.verb not in WRITES or not 200 <= status < 300:
            return None
        # `is_due` must be called for every kill, because each of them counts the write. `next` with a generator would
        # stop at the first kill that is due.
        due = [kill for kill in self.kills if kill.is_due(request)]
        return due[0] if due else None

    async def _watch(self, incoming: web.Request, request: Request, fault: Fault | None) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        self._watches.add(task)
        try:
            async with self._upstream(incoming, fault, b"") as response:
                self._note(request, response.status)
                if response.status != 200:
                    return web.Response(status=response.status, body=await response.read())
                await answer.prepare(incoming)
                async for line in _edited(response.content, fault):
                    await answer.write(line)
        except (aiohttp.ClientError, ConnectionError, asyncio.CancelledError):
            if not answer.prepared:
                self._note(request, 0)
            # When the API server's stream breaks off or `end_watches` cancels this task, the operator must see a
            # connection reset and not the regular end of a stream.
            return self._reset(incoming)
        finally:
            self._watches.discard(task)
        await answer.write_eof()
        return answer

    @contextlib.asynccontextmanager
    async def _upstream(
        self, incoming: web.Request, fault: Fault | None, body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        query = dict(incoming.query)
        if isinstance(fault, ServeOld):
            query.pop("continue", None)
            query |= {"resourceVersion": fault.resource_version}
            if "watch" not in query:
                query["resourceVersionMatch"] = "Exact"
        headers = {name: value for name, value in incoming.headers.items() if name.lower() not in _HOP_HEADERS}
        url = self._target + incoming.path
        async with self._session.request(
            incoming.method, url, params=query, data=body or None, headers=headers
        ) as response:
            yield response

    def _reset(self, incoming: web.Request) -> web.Response:
        """Close the operator's connection with a TCP reset."""
        transport = incoming.transport
        if transport is not None:
            connection = transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()

    def _note(self, request: Request, status: int) -> None:
        self.records.append(Record(time.monotonic(), request, status))


def _kill(kill: Kill) -> None:
    pid = kill.victim()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        kill.struck = True


async def _edited(stream: aiohttp.StreamReader, fault: Fault | None) -> AsyncIterator[bytes]:
    """Yield the lines that the operator gets for the API server's watch stream ``stream``, as ``fault`` changes them. A
    fault that does not concern streams changes nothing."""
    if isinstance(fault, StreamError):
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": fault.code, "reason": fault.reason}
        yield _line({"type": "ERROR", "object": status | {"message": "an error by the proxy"}})
        return
    sent = 0
    while line := await stream.readline():
        if isinstance(fault, CutWatch) and sent >= fault.after_events:
            return
        sent += 1
        if isinstance(fault, EditEvents):
            for event in fault.edit(json.loads(line)):
                yield _line(event)
        else:
            yield line


def _line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"
