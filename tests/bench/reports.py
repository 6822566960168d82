"""Measure how much memory the clients of the report server cost the operator. The clients are honest jobs, idle
connections, unfinished requests, and a flood of connections. For the honest jobs, the CPU time and the delay of the
event loop are measured too.

The measured server is the operator's report server with TLS, in a process of its own. The clients connect from many
addresses of this machine. No status is written here. `reporting.py` measures reports to the whole operator.

    python -m tests.bench --only reports
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from finetune_core.contract import CurvePoint, report_path
from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports.server import ReportServer
from finetune_operator.reports.token_review import TokenReviewer
from tests.operator.report_servers import Streams, connect, exchange, request, serving
from tests.operator.report_tokens import Reviews, report_token
from tests.operator.test_report_server import body

LONG = 3600.0
UNLIMITED = ConnectionLimits(
    connections=10_000,
    per_address=10_000,
    handshake_seconds=LONG,
    header_seconds=LONG,
    idle_seconds=LONG,
    handshakes_per_second=1e6,
)
"""Limits that close no connection, so that the memory of one connection can be measured."""
HEADER = b"POST / HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"b" * 8000 + b"\r\n" + b"c: " + b"d" * 7000
"""An HTTP header of 15 KB without its end. The server stores at most about this much of a request before it has seen a
token."""
AT_ONCE = 50
JOBS = 1000
CURVE = [CurvePoint(step=step, loss=1.25, perplexity=2.5) for step in range(60)]
REPORT_SECONDS = 3.0
"""Seconds between two reports of a job, as in the trainer."""
MEASURED_SECONDS = 60.0
TICK_SECONDS = 0.01
"""Seconds between two measurements of how late the server's event loop is."""


@dataclass
class Server:
    """A report server in another process."""

    port: int
    pid: int
    lateness: float = 0.0
    """99th percentile of the seconds by which the event loop was late. It is set after the server has ended."""
    processor: float = 0.0
    """CPU seconds that the server used. They are set after the server has ended."""

    def megabytes(self, field: str = "VmRSS") -> float:
        """Return the present resident memory of the server in MiB. With the field ``"VmHWM"``, return the highest value
        so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _serve(limits: ConnectionLimits, told: Connection) -> None:
    """Send the port over ``told`` and serve the reports of `JOBS` jobs until a message arrives. Then send the 99th
    percentile of the event loop's lateness and the CPU time of this process, both in seconds."""

    async def run() -> None:
        reviewer = TokenReviewer(Reviews())  # type: ignore[arg-type]
        memory, queue, late = Memory(), WorkQueue(), [0.0]
        for number in range(JOBS):
            attempt = ReportingAttempt(uid=f"uid-{number}", attempt=1, pod_uids=frozenset({f"pod-{number}"}))
            memory.set_reporting_attempt(Key("team", f"job-{number}"), attempt.uid, attempt)
        server = ReportServer(memory=memory, queue=queue, reviewer=reviewer, metrics=Metrics())
        async with serving(server, limits) as port:
            told.send(port)
            others = [asyncio.create_task(_drain(queue)), asyncio.create_task(_measure_lateness(late))]
            await asyncio.get_running_loop().run_in_executor(None, told.recv)
            for task in others:
                task.cancel()
        late.sort()
        told.send((late[int(0.99 * len(late))], time.process_time()))

    asyncio.run(run())


async def _drain(queue: WorkQueue) -> None:
    """Take the keys out of the queue, as the operator's workers do."""
    while True:
        queue.done(await queue.get())


async def _measure_lateness(late: list[float]) -> None:
    """Append to ``late``, again and again, the number of seconds by which the event loop woke this task too late."""
    while True:
        due = time.monotonic() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        late.append(time.monotonic() - due)


@contextmanager
def report_server(limits: ConnectionLimits) -> Iterator[Server]:
    """Run a report server with ``limits`` in a new process, and end it after the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(limits, theirs))
    process.start()
    assert process.pid is not None
    try:
        server = Server(ours.recv(), process.pid)
        yield server
        ours.send("end")
        server.lateness, server.processor = ours.recv()
    finally:
        process.join(10)
        process.kill()


async def _open(port: int, count: int, sent: bytes) -> tuple[list[Streams], int]:
    """Open ``count`` connections from many addresses, and send the bytes ``sent`` on each. Return the open connections,
    and the number of connections that failed."""
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


async def _report_forever(port: int, number: int, answers: Counter[int]) -> None:
    """Send a report of job ``number`` every three seconds. All reports go over one connection until it ends, and then
    over a new connection."""
    token = report_token(f"pod-{number}", job_uid=f"uid-{number}")
    path, streams, step = report_path("team", f"job-{number}", 1), None, 0
    await asyncio.sleep(REPORT_SECONDS * number / JOBS)
    while True:
        step += 1
        try:
            if streams is None:
                streams = await connect(port, f"127.1.{number % 200}.{number % 250 + 1}")
            report = body(pod_uid=f"pod-{number}", step=step, total_steps=10**6, history=CURVE)
            status, _, _ = await exchange(streams, request(path, token, report))
        except OSError:
            status = 0
        answers[status] += 1
        if status == 0:
            streams = None
        await asyncio.sleep(REPORT_SECONDS)


async def _honest(server: Server) -> str:
    answers: Counter[int] = Counter()
    reporters = [asyncio.create_task(_report_forever(server.port, number, answers)) for number in range(JOBS)]
    await asyncio.sleep(MEASURED_SECONDS)
    told = f"peak {server.megabytes('VmHWM'):.0f} MB, answers {dict(answers)}"
    for task in reporters:
        task.cancel()
    await asyncio.gather(*reporters, return_exceptions=True)
    return told


ROWS: dict[str, tuple[ConnectionLimits, int, bytes]] = {
    "1,000 idle connections": (UNLIMITED, 1000, b""),
    "1,000 unfinished headers of 15 KB": (UNLIMITED, 1000, HEADER),
    "5,000 connections with such headers, the default limits": (ConnectionLimits(), 5000, HEADER),
}
"""The measurements without honest jobs, by the printed name. Each has the limits of the server, the number of
connections, and the bytes that each connection sends."""


def main() -> None:
    """Make all measurements and print the results."""
    with report_server(ConnectionLimits()) as server:
        told = asyncio.run(_honest(server))
    print(f"{JOBS} honest jobs for {MEASURED_SECONDS:.0f} s, the default limits: {told}, event loop late by")
    print(f"{1000 * server.lateness:.0f} ms (p99), {server.processor:.1f} s of processor time", flush=True)
    for name, (limits, count, sent) in ROWS.items():
        with report_server(limits) as server:
            print(f"{name}: {asyncio.run(_measure(server, count, sent))}", flush=True)


if __name__ == "__main__":
    main()
