"""What clients of the report server cost the operator in memory: idle connections, unfinished requests, and a flood.

The server is the operator's own, over TLS, in a process of its own; the clients have many addresses of this machine.

    python -m tests.bench --only reports
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports.server import ReportServer
from finetune_operator.reports.token_review import TokenReviewer
from tests.operator.report_servers import Streams, connect, serving
from tests.operator.report_tokens import Reviews

LONG = 3600.0
UNLIMITED = ConnectionLimits(
    connections=10_000,
    per_address=10_000,
    handshake_seconds=LONG,
    header_seconds=LONG,
    idle_seconds=LONG,
    handshakes_per_second=1e6,
)
"""Limits that let every connection stay, to measure what one costs."""
HEADER = b"POST / HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"b" * 8000 + b"\r\n" + b"c: " + b"d" * 7000
"""A header of 15 KB without its end: the most that the server keeps of a request without a token."""
AT_ONCE = 50


@dataclass
class Server:
    """A report server in another process."""

    port: int
    pid: int

    def megabytes(self, field: str = "VmRSS") -> float:
        """Return the resident memory of the server now, or its peak with the field ``"VmHWM"``."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _serve(limits: ConnectionLimits, told: Connection) -> None:
    async def run() -> None:
        reviewer = TokenReviewer(Reviews())  # type: ignore[arg-type]
        server = ReportServer(memory=Memory(), queue=WorkQueue(), reviewer=reviewer, metrics=Metrics())
        async with serving(server, limits) as port:
            told.send(port)
            await asyncio.get_running_loop().run_in_executor(None, told.recv)

    asyncio.run(run())


@contextmanager
def report_server(limits: ConnectionLimits) -> Iterator[Server]:
    """Run a report server with ``limits`` in a new process, and end it after the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(limits, theirs))
    process.start()
    assert process.pid is not None
    try:
        yield Server(ours.recv(), process.pid)
    finally:
        ours.send("end")
        process.join()


async def _open(port: int, count: int, sent: bytes) -> tuple[list[Streams], int]:
    """Open ``count`` connections from many addresses and send ``sent`` on each; return them and the number refused."""
    held: list[Streams] = []
    refused = 0
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        nonlocal refused
        async with slots:
            try:
                streams = await connect(port, f"127.0.{number % 200}.{number % 250 + 1}")
                streams[1].write(sent)
                await streams[1].drain()
                held.append(streams)
            except OSError:
                refused += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return held, refused


async def _measure(server: Server, count: int, sent: bytes) -> str:
    before = server.megabytes()
    held, refused = await _open(server.port, count, sent)
    after, peak = server.megabytes(), server.megabytes("VmHWM")
    for _, writer in held:
        writer.transport.abort()
    return f"{before:.0f} -> {after:.0f} MB, peak {peak:.0f} MB, {len(held)} opened, {refused} refused"


ROWS: dict[str, tuple[ConnectionLimits, int, bytes]] = {
    "1,000 idle connections": (UNLIMITED, 1000, b""),
    "1,000 unfinished headers of 15 KB": (UNLIMITED, 1000, HEADER),
    "5,000 connections with such headers, the default limits": (ConnectionLimits(), 5000, HEADER),
}
"""What is measured: the limits of the server, the number of connections, and what each sends."""


def main() -> None:
    """Print a line for each measurement."""
    for name, (limits, count, sent) in ROWS.items():
        with report_server(limits) as server:
            print(f"{name}: {asyncio.run(_measure(server, count, sent))}", flush=True)


if __name__ == "__main__":
    main()
