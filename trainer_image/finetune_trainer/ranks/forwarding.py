"""Serves TCP connections in a thread of the launcher, and forwards the bytes of each over a second connection.

`gate.py` says which connections may pass. Nothing here knows the key of an attempt, and nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from finetune_trainer.pod.errors import OutsideFailure

RETRY_SECONDS = 0.2
"""Pause in seconds between two tries to open the second connection, because the program at its far end may still be
starting."""
LAST_BYTES_SECONDS = 2.0
"""For how many seconds after the end of the workers their last bytes are still forwarded."""
JOIN_SECONDS = 10.0
"""How many seconds the launcher waits for the end of the thread that serves the connections."""
PIECE_BYTES = 64 * 1024

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]
"""A function that `asyncio.start_server` calls for each new connection."""


class RefusedError(Exception):
    """The ends of a connection did not prove to each other that they belong to the attempt."""


class Forwarder(ABC):
    """Serves connections: opens a second connection for each, and forwards the bytes between the two."""

    def __init__(self) -> None:
        self._opening: set[asyncio.Task[Any]] = set()
        """The tasks that serve connections of which no bytes are forwarded yet."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it or its second connection is closed. Close it at once where `_open` returns no
        second connection."""
        with _closing(writer):
            task = asyncio.current_task()
            assert task is not None
            self._opening.add(task)
            try:
                far_end = await self._open(reader, writer)
            finally:
                self._opening.discard(task)
            if far_end is not None:
                await _forward(reader, writer, far_end)

    def end_opening(self) -> None:
        """End all connections of which no bytes are forwarded yet, because the workers have ended."""
        for task in self._opening:
            task.cancel()

    @abstractmethod
    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams | None:
        """Return the second connection for the first one, whose streams are ``reader`` and ``writer``. Return None
        where the first connection must not pass, or where the second connection can't be opened."""


class Target:
    """The port to which connections are forwarded. Until the first connection succeeds, the program that listens at the
    port may still be starting."""

    def __init__(
        self,
        address: str,
        port: int,
        handshake: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None,
        *,
        seconds: float,
    ) -> None:
        self._address, self._port, self._handshake, self._seconds = address, port, handshake, seconds
        self._reached = False

    async def connect(self) -> Streams | None:
        """Return a new connection to the port. Return None where the port was reached before and can't be reached any
        more, or was not reached in time."""
        deadline = time.monotonic() + self._seconds
        told = False
        while True:
            try:
                streams = await asyncio.open_connection(self._address, self._port)
            except OSError:
                if self._reached:
                    return None
            else:
                try:
                    if self._handshake is not None:
                        await self._handshake(*streams)
                except BaseException as error:
                    streams[1].close()
                    if not isinstance(error, RefusedError):
                        raise
                    if not told:
                        print(f"no connection to rank 0 yet: {error}", file=sys.stderr, flush=True)
                    told = True
                else:
                    self._reached = True
                    return streams
            if time.monotonic() > deadline:
                return None
            # No event shows that a program has begun to listen, so the port is tried again after a pause.
            await asyncio.sleep(RETRY_SECONDS)


@contextlib.contextmanager
def served(forwarder: Forwarder, start: Callable[[Connected], Awaitable[asyncio.Server]], port: int) -> Iterator[None]:
    """Inside the block, let ``forwarder`` serve the connections to the server that ``start`` starts, in a thread of its
    own. Raises OutsideFailure, which names ``port``, where the server can't listen."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(problem_printer())
    started = threading.Event()
    stopping = asyncio.Event()
    failed: list[OSError] = []
    serving: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if stopping.is_set():
            writer.close()
            return
        # asyncio can start the task itself, but would then report a problem where the task is cancelled.
        task = loop.create_task(forwarder.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(ended)

    def ended(task: asyncio.Task[None]) -> None:
        serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            loop.call_exception_handler({"message": "a connection was not served", "exception": error})

    async def serve() -> None:
        try:
            server = await start(connected)
        except OSError as error:
            failed.append(error)
            return
        finally:
            started.set()
        await stopping.wait()
        server.close()
        forwarder.end_opening()
        # The workers have ended, so the connections of the workers end by themselves once the last bytes are forwarded.
        if serving:
            await asyncio.wait(serving, timeout=LAST_BYTES_SECONDS)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # One more iteration of the event loop closes the sockets of the tasks that ended.
        await asyncio.sleep(0)

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(serve())

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    started.wait()
    if failed:
        raise OutsideFailure(f"port {port}, at which the ranks meet, can't be opened: {failed[0].strerror}")
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(JOIN_SECONDS)


def problem_printer() -> Callable[[asyncio.AbstractEventLoop, Mapping[str, Any]], None]:
    """Return a function that prints a problem of an event loop as one line, if the problem is the first, second,
    fourth, eighth and so on. Clients can cause many problems, for example if they use up all file descriptors."""
    count = 0

    def print_problem(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        nonlocal count
        count += 1
        if is_power_of_two(count):
            text = f"{context['message']}: {context.get('exception')!r}"
            print(f"problem at the rendezvous port: {text} ({count} so far)", file=sys.stderr, flush=True)

    return print_problem


async def _forward(near_reader: asyncio.StreamReader, near: asyncio.StreamWriter, far_end: Streams) -> None:
    """Forward bytes in both directions until one end closes its connection. Then close ``far_end``. The caller closes
    ``near``."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(PIECE_BYTES):
            sink.write(piece)
            await sink.drain()

    far_reader, far = far_end
    with _closing(far):
        copies = [asyncio.ensure_future(copy(near_reader, far)), asyncio.ensure_future(copy(far_reader, near))]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in copies:
                task.cancel()
            # A broken connection is a usual end of forwarding, so the errors of both directions are dropped.
            await asyncio.gather(*copies, return_exceptions=True)


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    """Close the connection at the end of the block. A connection that the other end has broken is no error."""
    try:
        with contextlib.suppress(OSError):
            yield
    finally:
        writer.close()


def is_power_of_two(count: int) -> bool:
    """Return whether ``count`` (1 or more) is 1, 2, 4, 8 and so on."""
    return count & (count - 1) == 0
