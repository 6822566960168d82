"""The operator's servers disconnect clients that do nothing, or too much, and serve other clients meanwhile.

The tests run these servers on this machine. Where a test waits until a time limit of the server ends a connection, this
limit is short. Most tests set the other limits in `PATIENT` so long that even a slow machine does not reach them.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from asyncio import sslproto
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession

from finetune_operator.process import health
from finetune_operator.process.connections import SEND_BUFFER_BYTES, TLS_BUFFER_BYTES, ConnectionLimits, client_of
from finetune_operator.process.health import HealthServer, WatchActivity
from finetune_operator.process.metrics import Metrics
from finetune_operator.process.rate_limit import MOST_BUCKETS, RateLimiter
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports.server import ReportServer
from finetune_operator.reports.token_review import TokenReviewer
from tests.operator.builders import UID
from tests.operator.operators import KEY
from tests.operator.report_servers import Streams, answer_to, connect, ended, exchange, request, serving
from tests.operator.report_tokens import Reviews, report_token
from tests.operator.test_report_server import PATH, body, known_attempt
from tests.operator.test_settings import waiting_leadership

LONG = 600.0
"""A limit in seconds that is never reached."""
PATIENT: dict[str, Any] = {"handshake_seconds": LONG, "header_seconds": LONG, "idle_seconds": LONG}


@asynccontextmanager
async def reports(limits: ConnectionLimits, reviews: Reviews | None = None) -> AsyncIterator[ReportServer]:
    """Run a report server that knows attempt 2 of the job `team/quickstart`."""
    memory = Memory()
    memory.set_reporting_attempt(KEY, UID, known_attempt())
    reviewer = TokenReviewer(reviews or Reviews())  # type: ignore[arg-type]
    server = ReportServer(memory=memory, queue=WorkQueue(), reviewer=reviewer, metrics=Metrics())
    async with serving(server, limits):
        yield server


async def reported(streams: Streams) -> int:
    """Send a valid report and return the HTTP status of the answer, or 0 if the server ends the connection without an
    answer."""
    return (await exchange(streams, request(PATH, report_token(), body())))[0]


async def end(streams: Streams) -> None:
    streams[1].transport.abort()


async def test_a_client_that_begins_no_tls_is_disconnected() -> None:
    async with reports(ConnectionLimits(handshake_seconds=0.1)) as server:
        streams = await asyncio.open_connection("127.0.0.1", server.port)
        assert await ended(streams)
        await end(streams)


@pytest.mark.parametrize("sent", [b"", b"P", b"POST / HTTP/1.1\r\nHost: x\r\n", request(PATH)[:-2]])
async def test_a_header_that_does_not_end_in_time_ends_the_connection(sent: bytes) -> None:
    async with reports(ConnectionLimits(**PATIENT | {"header_seconds": 0.2})) as server:
        streams = await connect(server.port)
        streams[1].write(sent)
        assert await ended(streams)


async def test_a_header_that_arrives_drop_by_drop_has_no_more_time() -> None:
    async with reports(ConnectionLimits(**PATIENT | {"header_seconds": 0.2})) as server:
        streams = await connect(server.port)
        streams[1].write(b"POST / HTTP/1.1\r\nHost: ")
        closed = asyncio.create_task(ended(streams))
        while not closed.done():
            streams[1].write(b"x")
            await asyncio.sleep(0.01)
        assert await closed


async def test_the_second_request_of_a_connection_has_the_same_limits() -> None:
    async with reports(ConnectionLimits(**PATIENT | {"header_seconds": 1.0})) as server:
        streams = await connect(server.port)
        assert await reported(streams) == 204
        streams[1].write(b"POST ")
        assert await ended(streams)


async def test_a_connection_that_waits_too_long_for_its_next_request_ends() -> None:
    async with reports(ConnectionLimits(**PATIENT | {"idle_seconds": 0.2})) as server:
        streams = await connect(server.port)
        assert await reported(streams) == 204
        assert await ended(streams)


async def test_a_request_that_is_never_answered_ends_its_connection() -> None:
    reviews = Reviews()
    reviews.answering.clear()
    async with reports(ConnectionLimits(**PATIENT, request_seconds=0.3), reviews) as server:
        streams = await connect(server.port)
        assert await reported(streams) == 0


@pytest.mark.parametrize(
    "field", [b"a: " + b"b" * 8000, b"\r\n".join(b"a%d: %s" % (number, b"b" * 900) for number in range(19))]
)
async def test_a_long_header_ends_the_connection(field: bytes) -> None:
    limits = ConnectionLimits(**PATIENT, header_bytes=16 * 1024)
    async with reports(limits) as server:
        streams = await connect(server.port)
        start = b"POST / HTTP/1.1\r\nHost: x\r\n"
        status, _, _ = await exchange(streams, start + b"\r\n".join([field] * 3))
        assert status in (0, 400)
        assert await ended(streams)


async def test_line_ends_before_a_request_count_as_its_header_and_do_not_end_it() -> None:
    limits = ConnectionLimits(**PATIENT | {"header_seconds": 0.5}, header_bytes=16 * 1024, connections=2)
    async with reports(limits) as server:
        streams = await connect(server.port)
        streams[1].write(b"\r\n\r\n")
        assert await ended(streams), "a connection without a request is not busy"
        streams = await connect(server.port)
        streams[1].write(b"\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000)
        assert await ended(streams)
        streams = await connect(server.port)
        assert (await exchange(streams, b"\r\n\r\n" + request(PATH, report_token(), body())))[0] == 204
        await end(streams)


async def test_requests_that_are_sent_before_the_first_is_answered_are_bounded() -> None:
    reviews = Reviews()
    reviews.answering.clear()
    async with reports(ConnectionLimits(**PATIENT, request_bytes=100_000), reviews) as server:
        streams = await connect(server.port)
        streams[1].write(request(PATH, report_token(), body()))
        while not reviews.asked:
            await asyncio.sleep(0.01)
        streams[1].write(request(PATH, None, "", "a: " + "b" * 8000) * 20)
        assert await ended(streams)
        reviews.answering.set()


async def test_the_bytes_of_a_body_do_not_count_as_a_header() -> None:
    async with reports(ConnectionLimits(**PATIENT, header_bytes=4096)) as server:
        streams = await connect(server.port)
        for _ in range(3):
            long = body(notices=["x" * 500] * 8) + " " * 20_000
            assert (await exchange(streams, request(PATH, report_token(), long)))[0] == 204
        await end(streams)


async def test_the_body_of_a_refused_request_is_no_next_request() -> None:
    """The connection ends after the refusal. Otherwise a client could hide a request in a body, and a long body would
    count as a header."""
    async with reports(ConnectionLimits(**PATIENT)) as server:
        streams = await connect(server.port)
        hidden = request(PATH, report_token(), body())
        whole = request(PATH, None, "x" * 30_000 + hidden.decode())
        assert (await exchange(streams, whole))[0] == 401
        assert await streams[0].read() == b""


async def test_many_requests_at_once_are_refused_and_their_connection_ends() -> None:
    async with reports(ConnectionLimits(**PATIENT, requests_per_second=1.0)) as server:
        streams = await connect(server.port)
        assert [await reported(streams) for _ in range(5)] == [204, 204, 204, 204, 429]
        assert await ended(streams)
        assert (await answer_to(server.port, request(PATH, report_token(), body()), "127.0.0.2"))[0] == 204


async def test_the_oldest_idle_connection_of_an_address_gives_way() -> None:
    async with reports(ConnectionLimits(**PATIENT, per_address=3)) as server:
        first, second, third = [await connect(server.port) for _ in range(3)]
        other = await connect(server.port, "127.0.0.2")
        assert await reported(first) == 204, "now the second one is idle for longest"
        fourth = await connect(server.port)
        assert await reported(fourth) == 204
        assert await ended(second)
        assert [await reported(streams) for streams in (first, third, other)] == [204] * 3
        assert server.connections == 4


async def test_the_oldest_idle_connection_of_all_gives_way() -> None:
    async with reports(ConnectionLimits(**PATIENT, connections=3)) as server:
        held = [await connect(server.port, f"127.0.0.{number}") for number in range(2, 5)]
        newest = await connect(server.port, "127.0.0.9")
        assert await ended(held[0])
        assert [await reported(streams) for streams in (*held[1:], newest)] == [204] * 3


async def test_a_connection_without_tls_gives_way_too() -> None:
    async with reports(ConnectionLimits(**PATIENT, connections=2)) as server:
        silent = await asyncio.open_connection("127.0.0.1", server.port)
        kept = await connect(server.port, "127.0.0.2")
        newest = await connect(server.port, "127.0.0.3")
        assert await ended(silent)
        assert [await reported(streams) for streams in (kept, newest)] == [204] * 2
        await end(silent)


async def test_a_request_that_is_being_answered_does_not_give_way() -> None:
    reviews = Reviews()
    reviews.answering.clear()
    async with reports(ConnectionLimits(**PATIENT, connections=1), reviews) as server:
        streams = await connect(server.port)
        answer = asyncio.create_task(reported(streams))
        while not reviews.asked:
            await asyncio.sleep(0.01)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await connect(server.port, "127.0.0.2")
        reviews.answering.set()
        assert await answer == 204
        assert (await answer_to(server.port, request(PATH, report_token(), body()), "127.0.0.2"))[0] == 204


async def test_an_address_makes_few_connections_a_second() -> None:
    limits = ConnectionLimits(**PATIENT, per_address=4)
    async with reports(limits) as server:
        made = 0
        try:
            while made < 200:
                await end(await connect(server.port))
                made += 1
        except (ConnectionError, ssl.SSLError):
            assert made >= 2 * limits.per_address
        assert made < 200
        assert (await answer_to(server.port, request(PATH, report_token(), body()), "127.0.0.2"))[0] == 204


async def test_a_thousand_idle_connections_have_small_buffers_and_leave_room_for_a_report() -> None:
    limits = ConnectionLimits(**PATIENT, connections=1100, per_address=100, handshakes_per_second=1e6)
    async with reports(limits) as server:
        held = [await connect(server.port, f"127.0.1.{number % 20 + 1}") for number in range(1000)]
        assert server.connections == 1000
        ours = [found for found in gc.get_objects() if isinstance(found, sslproto.SSLProtocol) and found._server_side]
        assert len(ours) == 1000
        assert {len(vars(protocol)["_ssl_buffer"]) for protocol in ours} == {TLS_BUFFER_BYTES}
        assert (await answer_to(server.port, request(PATH, report_token(), body())))[0] == 204
        for streams in held:
            await end(streams)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Switch off the garbage collector. A socket that the server forgets to close then stays open, and its client waits
    for a minute, which is longer than the time limit of the test."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.timeout(50)
@pytest.mark.usefixtures("uncollected")
async def test_a_flood_of_connections_leaves_an_honest_client_served() -> None:
    """300 tasks connect five times each, a third of them without TLS, while one client sends reports over one
    connection."""
    async with reports(ConnectionLimits(per_address=8)) as server:
        honest = await connect(server.port, "127.0.0.2")
        assert await reported(honest) == 204

        async def attack(number: int) -> None:
            source = f"127.0.3.{number % 4 + 1}"
            for _ in range(5):
                try:
                    if number % 3:
                        await answer_to(server.port, request(PATH), source)
                    else:
                        streams = await asyncio.open_connection("127.0.0.1", server.port, local_addr=(source, 0))
                        streams[1].write(b"x" * 100)
                        await end(streams)
                except (OSError, asyncio.IncompleteReadError):
                    continue

        attacks = [asyncio.create_task(attack(number)) for number in range(300)]
        statuses = [(await answer_to(server.port, request(PATH, report_token(), body()), "127.0.0.3"))[0]]
        while not all(task.done() for task in attacks):
            statuses.append(await reported(honest))
            await asyncio.wait(attacks, timeout=0.2)
        await asyncio.gather(*attacks)
        assert set(statuses) == {204}


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
async def test_a_server_listens_where_it_is_told_and_stops(address: str) -> None:
    server = health_server()
    await server.start(0, address)
    port = server.port
    async with ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
        assert answer.status == 200
    await server.stop()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)


def health_server(metrics: Metrics | None = None) -> HealthServer:
    return HealthServer(
        activity=WatchActivity(),
        queue=WorkQueue(),
        metrics=metrics or Metrics(),
        leadership=waiting_leadership(),
        resync_seconds=300,
    )


async def test_metrics_are_rendered_once_a_second_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, rendered, now = Metrics(), [0], [100.0]
    render = metrics.render

    def counting() -> bytes:
        rendered[0] += 1
        return render()

    monkeypatch.setattr(metrics, "render", counting)
    server = HealthServer(
        activity=WatchActivity(),
        queue=WorkQueue(),
        metrics=metrics,
        leadership=waiting_leadership(),
        resync_seconds=300,
        clock=lambda: now[0],
    )
    await server.start(0, "127.0.0.1")
    try:
        async with ClientSession() as session:

            async def scrape() -> bytes:
                async with session.get(f"http://127.0.0.1:{server.port}/metrics") as answer:
                    return await answer.read()

            texts = await asyncio.gather(*(scrape() for _ in range(30)))
            assert rendered == [1]
            assert set(texts) == {texts[0]}
            assert b"finetune_leader" in texts[0]
            now[0] += health.METRICS_SECONDS
            await scrape()
            assert rendered == [2]
    finally:
        await server.stop()


async def test_clients_that_do_not_read_the_metrics_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    monkeypatch.setattr(metrics, "render", lambda: b"x" * 16_000_000)
    server = health_server(metrics)
    await server.start(0, "127.0.0.1")
    try:
        streams = [await asyncio.open_connection("127.0.0.1", server.port, limit=1024) for _ in range(20)]
        for _, writer in streams:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in streams:
            assert (await reader.readline()).endswith(b" 200 OK\r\n")
        assert server._listener is not None
        for transport in server._listener.by_transport:
            assert isinstance(transport, asyncio.WriteTransport)
            assert transport.get_write_buffer_size() <= 4 * health.PIECE_BYTES
            kernel = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert kernel <= 2 * SEND_BUFFER_BYTES
        async with ClientSession() as session, session.get(f"http://127.0.0.1:{server.port}/metrics") as answer:
            assert len(await answer.read()) == 16_000_000
        for each in streams:
            await end(each)
    finally:
        await server.stop()


async def test_the_health_server_bounds_its_clients_too() -> None:
    server = health_server()
    await server.start(0, "127.0.0.1")
    try:
        held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(server.limits.connections + 8)]
        assert await ended(held[0])
        async with ClientSession() as session, session.get(f"http://127.0.0.1:{server.port}/healthz") as answer:
            assert answer.status == 200
        assert server.connections <= server.limits.connections
        for streams in held:
            await end(streams)
    finally:
        await server.stop()


def test_no_client_with_the_kubelets_address_can_have_its_probes_refused() -> None:
    """One address may have as many connections to the health server, and open as many per second, as all addresses
    together. It may also send a request over each connection that it opens."""
    limits = HealthServer.limits
    assert limits.per_address >= limits.connections
    assert limits.per_address / 2 >= limits.handshakes_per_second
    assert limits.requests_per_second >= limits.handshakes_per_second


async def test_a_client_that_connects_without_a_pause_leaves_others_their_turn() -> None:
    server = health_server()
    await server.start(0, "127.0.0.1")
    pending = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    try:
        turns = 0
        while server.connections < len(pending):
            await asyncio.sleep(0)
            turns += 1
        assert turns > len(pending) // 2, "the connections were accepted in one go"
    finally:
        for each in pending:
            each.close()
        await server.stop()


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_network_of_ipv6_counts_as_one_client(address: str, client: str) -> None:
    assert client_of(address) == client


def test_a_rate_allows_a_burst_and_then_its_rate_for_each_client() -> None:
    now = [0.0]
    limiter = RateLimiter(2.0, 3.0, clock=lambda: now[0])
    assert [limiter.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limiter.allows("b")
    now[0] = 1.0
    assert [limiter.allows("a") for _ in range(3)] == [True, True, False]
    now[0] = 100.0
    assert [limiter.allows("a") for _ in range(4)] == [True, True, True, False]


def test_a_rate_keeps_a_bounded_number_of_clients() -> None:
    limiter = RateLimiter(1.0, 1.0, clock=lambda: 0.0)
    for number in range(3 * MOST_BUCKETS):
        limiter.allows(number)
    assert len(limiter._buckets) == MOST_BUCKETS
