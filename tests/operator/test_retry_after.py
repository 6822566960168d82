"""After a 429, or a 503 with `Retry-After`, the client of the API server delays all its requests, not only the refused
one. The watches, which kopf runs, wait after a 429 as well, for a whole number of seconds from 1 to MOST_SECONDS."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import kopf
import pytest
from aiohttp import web

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import TRIES_IF_OVERLOADED, KubeClient
from finetune_operator.kube.retry_after import DEFAULT_SECONDS, MOST_SECONDS, LoadLimit, pause_seconds
from finetune_operator.kube.watch_session import watch_session
from finetune_operator.queue.key import Key
from finetune_operator.watches import _Login
from tests.operator.report_servers import api_configuration

NOON = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (200, None, None),
        (200, "5", None),
        (404, "5", None),
        (409, None, None),
        (500, "5", None),
        (429, "5", 5.0),
        (429, "0", 0.0),
        (429, None, DEFAULT_SECONDS),
        (429, "soon", DEFAULT_SECONDS),
        (429, "-3", DEFAULT_SECONDS),
        (429, "86400", MOST_SECONDS),
        (429, "9" * 64, MOST_SECONDS),
        (429, "9" * 8000, DEFAULT_SECONDS),
        (429, "Tue, 24 Nov 99999999999999999999 12:00:07 GMT", DEFAULT_SECONDS),
        (429, "Tue, 24 Nov 2026 12:00:07 +9999999999999", DEFAULT_SECONDS),
        (429, "Tue, 24 Nov 2026 12:00:07 GMT", 7.0),
        (429, "Tue, 24 Nov 2026 11:00:00 GMT", 0.0),
        (503, "5", 5.0),
        (503, None, None),
    ],
)
def test_how_long_an_answer_asks_the_client_to_pause(status: int, header: str | None, seconds: float | None) -> None:
    assert pause_seconds(status, {} if header is None else {"Retry-After": header}, NOON) == seconds


async def test_everybody_waits_until_the_longest_pause_is_over() -> None:
    now = [100.0]
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            limit.pause(9)  # another answer asks for a longer pause meanwhile
        now[0] += seconds

    limit = LoadLimit(lambda: now[0], sleep)
    await limit.wait()
    assert slept == []
    limit.pause(5)
    limit.pause(2)
    await limit.wait()
    assert slept == [5, 4]
    assert now[0] == 109


Answer = Callable[[web.Request], web.Response]


@asynccontextmanager
async def client_of(answer: Answer) -> AsyncIterator[tuple[KubeClient, list[float]]]:
    """Run an API server on the loopback that answers with ``answer``; yield a client and the times of requests."""
    async with server_of(answer) as (address, times):
        client = KubeClient(api_configuration(address), lambda: None)
        try:
            yield client, times
        finally:
            await client.close()


@asynccontextmanager
async def server_of(answer: Answer) -> AsyncIterator[tuple[str, list[float]]]:
    """Run an API server on the loopback that answers with ``answer``; yield its address and the times of requests."""
    times: list[float] = []

    async def handle(request: web.Request) -> web.Response:
        times.append(time.monotonic())
        return answer(request)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield _address(runner), times
    finally:
        await runner.cleanup()


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


def _overloaded(seconds: str) -> web.Response:
    return web.json_response({"reason": "TooManyRequests"}, status=429, headers={"Retry-After": seconds})


async def test_after_a_429_no_request_of_the_client_is_sent_until_the_pause_is_over() -> None:
    answered: list[int] = []

    def answer(_request: web.Request) -> web.Response:
        answered.append(1)
        return _overloaded("1") if len(answered) == 1 else web.json_response({"metadata": {}, "items": []})

    async with client_of(answer) as (client, times):
        first = asyncio.ensure_future(client.get_job(Key("team", "a")))
        while not times:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)  # the answer arrives in this time, and most of the pause of 1 s is still to come
        others = [client.get_job(Key("team", f"b-{number}")) for number in range(10)]
        writes = [client.create_event("team", {"metadata": {"name": f"e-{number}"}}) for number in range(10)]
        await asyncio.gather(first, *others, *writes)
    assert len(times) == 22
    assert times[1] - times[0] >= 0.99, "a request was sent during the pause"


async def test_a_request_that_is_answered_with_429_again_and_again_fails_in_the_end() -> None:
    async with client_of(lambda _: _overloaded("0")) as (client, times):
        with pytest.raises(ApiError) as failure:
            await client.get_job(Key("team", "a"))
        assert failure.value.status == 429
        assert len(times) == TRIES_IF_OVERLOADED


async def test_a_503_pauses_the_client_but_is_not_sent_again() -> None:
    unavailable = web.HTTPServiceUnavailable

    def answer(_request: web.Request) -> web.Response:
        return web.Response(status=unavailable.status_code, headers={"Retry-After": "0"})

    async with client_of(answer) as (client, times):
        with pytest.raises(ApiError):
            await client.create_event("team", {"metadata": {"name": "e"}})
        assert len(times) == 1


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize(
    "text",
    ["", "<html>", "[]", "null", "1", "NaN", "9" * 5000, "[" * 100_000, '{"a":' * 100_000],
    ids=["nothing", "HTML", "a list", "null", "a number", "NaN", "many digits", "deep lists", "deep objects"],
)
async def test_an_answer_that_is_no_json_object_is_an_error_of_the_request(text: str, status: int) -> None:
    async with client_of(lambda _: web.Response(text=text, status=status)) as (client, _times):
        with pytest.raises(ApiError) as failure:
            await client.get_job(Key("team", "a"))
    assert (failure.value.status, failure.value.reason) == (status, "NotJSON" if status == 200 else "")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, "1"),
        ("5", "5"),
        ("0", "1"),
        ("0.5", "1"),
        ("-3", "1"),
        ("nan", "1"),
        ("inf", "1"),
        ("86400", "300"),
        ("9" * 5000, "1"),
        ("Tue, 24 Nov 2026 12:00:07 GMT", "1"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "300"),
    ],
)
async def test_the_watches_are_given_a_retry_after_that_they_can_obey(header: str | None, seconds: str) -> None:
    def answer(request: web.Request) -> web.Response:
        headers = {"X-Other": "x"} | ({} if header is None else {"retry-after": header})
        return web.Response(status=int(request.path.removeprefix("/")), headers=headers)

    async with server_of(answer) as (address, _), watch_session({}, ssl.create_default_context()) as session:
        refused = dict((await session.get(f"{address}/429")).headers)
        assert (refused["Retry-After"], refused["X-Other"]) == (seconds, "x")
        assert (await session.get(f"{address}/200")).headers.get("Retry-After") == header


async def test_the_watches_log_in_with_the_same_object_until_the_credentials_change() -> None:
    login = _Login()
    info = kopf.ConnectionInfo(server="https://api", token="a")
    first = login.session(info)
    second = login.session(dataclasses.replace(info))
    third = login.session(dataclasses.replace(info, token="b"))
    assert first is second
    assert first != third
    assert third.aiohttp_session.headers["Authorization"] == "Bearer b"
    await first.aiohttp_session.close()
    await third.aiohttp_session.close()
