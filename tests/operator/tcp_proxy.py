"""A TCP proxy between one replica of the operator and the API server, with which tests simulate a network partition.

After `TcpProxy.cut`, the proxy passes no data in either direction, and its connections stay open. `TcpProxy.heal`
resets these connections and discards the data that the proxy held back. A connection that a client opens between `cut`
and `heal` waits until `heal`, and then passes data as every later connection does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

from tests.cluster import Cluster
from tests.cluster.layout import API_PORT, HOST_ADDRESS

CHUNK = 65536
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """The proxy, which listens on 127.0.0.1 in the cluster's network namespace and forwards to the API server."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """URL of the proxy, which the operator uses as the API server's address."""
        return f"https://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Stop passing data, but keep all connections open."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        """Reset the connections from before `cut`, and pass the data of all other connections."""
        self._loop.call_soon_threadsafe(self._heal)

    def _heal(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._open.set()

    async def serve(self, ready: threading.Event) -> None:
        """Accept connections until this task is cancelled. Set ``ready`` as soon as the proxy listens."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST_ADDRESS, API_PORT)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        for end in ends:
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        pumps = [self._pump(reader, far_writer), self._pump(far_reader, writer)]
        try:
            await asyncio.gather(*pumps)
        finally:
            for end in ends:
                end.transport.abort()
            self._writers -= ends

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        # A broken connection ends the pump as the end of the data does.
        with contextlib.suppress(ConnectionError):
            while data := await source.read(CHUNK):
                await self._open.wait()
                if target.transport.is_closing():
                    return  # the connection was reset while the proxy held the data back
                target.write(data)
                await target.drain()
        target.transport.abort()


async def _end_the_rest() -> None:
    """Cancel the tasks of open connections, so that the event loop can be closed."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


@contextlib.contextmanager
def tcp_proxy(cluster: Cluster) -> Iterator[TcpProxy]:
    """Run a proxy in the cluster's network namespace, in a thread of its own."""
    loop = asyncio.new_event_loop()
    proxy = TcpProxy(loop)
    ready = threading.Event()

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.run_until_complete(_end_the_rest())
        loop.close()

    serving = loop.create_task(proxy.serve(ready))
    thread = threading.Thread(target=run, name="tcp-proxy")
    with cluster.enter():
        thread.start()
    assert ready.wait(10), "the proxy did not listen within 10 s"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(10)
