"""Requests without a valid token make the operator do nothing but review a limited number of tokens, and the answers do
not reveal which jobs exist.

In most tests the report server, its reviewer of tokens and the client of the API server are the real ones, and the API
server is a stand-in that records every request. Some tests run the reviewer alone, with a stand-in for the client.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import report_audience, report_path
from finetune_operator.kube.client import KubeClient
from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports import token_review
from finetune_operator.reports.server import TOKENS_AT_ONCE, ReportServer
from finetune_operator.reports.token_claims import read_claims
from finetune_operator.reports.token_review import TokenReviewer
from tests.operator.builders import UID
from tests.operator.operators import KEY
from tests.operator.report_servers import answer_to, api_configuration, connect, exchange, request, serving
from tests.operator.report_tokens import Reviews, encoded, report_token
from tests.operator.test_report_server import body

OTHERS_SECRET = "..%2F..%2F..%2F..%2F..%2F..%2Fapi%2Fv1%2Fnamespaces%2Fkube-system%2Fsecrets%2Fx"
IMPOSSIBLE = {
    "a path in the name": report_path("team", OTHERS_SECRET, 1),
    "a path in the namespace": report_path(f"{OTHERS_SECRET}%23", "x", 1),
    "another key of a job": report_path("team", "x%2F..%2Fquickstart", 1),
    "dots": "/v1/namespaces/team/finetunejobs/../attempts/1/report",
    "quoted dots": report_path("team", "%2e%2e", 1),
    "twice quoted": report_path("team", "x%252F..%252Fquickstart", 1),
    "a query in the namespace": report_path("..%2Fapi%2Fv1%2Fpods%3Fwatch=true", "x", 1),
    "a query": report_path("team", "x?watch=true", 1),
    "a fragment": report_path("team", "x%23", 1),
    "a line feed": report_path("team", "x%0a", 1),
    "lines of another request": report_path("team", "x%0d%0aHost:%20evil", 1),
    "a NUL": report_path("team", "x%00", 1),
    "upper case": report_path("Team", "X", 1),
    "no UTF-8": report_path("team", "%ff%fe", 1),
    "8 KB": report_path("n" * 4000, "x" * 4000, 1),
    "1 KB": report_path("n" * 500, "x" * 500, 1),
    "41 characters": report_path("team", "x" * 41, 1),
    "Kubeflow's path": f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/{OTHERS_SECRET}/status",
    "another server": "http://evil.example/v1/namespaces/team/finetunejobs/x%2F/attempts/1/report",
}
"""Paths that can't be the report path of any job. Each key says what is wrong with the path."""


@dataclass
class World:
    """What surrounds a running report server that knows attempt 2 of the job `team/quickstart`: everything that
    requests to the server can change, and what a test can set."""

    reviews: Reviews = field(default_factory=Reviews)
    calls: list[str] = field(default_factory=list)
    """Method and path of each request that the API server got."""
    memory: Memory = field(default_factory=Memory)
    queue: WorkQueue = field(default_factory=WorkQueue)
    metrics: Metrics = field(default_factory=Metrics)
    listed: bool = True
    now: float = 0.0
    port: int = 0

    def nothing_happened(self) -> bool:
        """Return whether no key was queued, and nothing is remembered of any job but the known one."""
        return len(self.queue) == 0 and self.queue.pop() is None and self.memory.job_keys() == [KEY]


@asynccontextmanager
async def running(limits: ConnectionLimits | None = None) -> AsyncIterator[World]:
    world = World()
    attempt = ReportingAttempt(uid=UID, attempt=2, pod_uids=frozenset({"pod-0"}))
    world.memory.set_reporting_attempt(KEY, UID, attempt)

    async def answer(sent: web.BaseRequest) -> web.Response:
        world.calls.append(f"{sent.method} {sent.path}")
        spec = (await sent.json())["spec"]
        return web.json_response({"status": await world.reviews.review_token(spec["token"], spec["audiences"][0])})

    runner = web.ServerRunner(web.Server(answer), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = KubeClient(api_configuration(f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda: None)
    server = ReportServer(
        memory=world.memory,
        queue=world.queue,
        reviewer=TokenReviewer(client, clock=lambda: world.now),
        metrics=world.metrics,
        jobs_are_listed=lambda: world.listed,
        clock=lambda: world.now,
    )
    try:
        async with serving(server, limits) as world.port:
            yield world
    finally:
        await client.close()
        await runner.cleanup()


@pytest.mark.parametrize("path", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
@pytest.mark.parametrize("token", [None, report_token(signature="forged"), report_token(namespace="kube-system")])
async def test_a_path_of_no_possible_job_does_nothing(path: str, token: str | None) -> None:
    async with running() as world:
        status, _, _ = await answer_to(world.port, request(path, token, body()))
        assert status in (400, 401, 404)
        assert world.calls == []
        assert world.nothing_happened()


REFUSED_TOKENS = {
    "no token": None,
    "no claims": "x.y.z",
    "two parts": "e30.e30",
    "not JSON": f"e30.{encoded(b'{')}.x",
    "no object": f"e30.{encoded(b'[1]')}.x",
    "deep": f"e30.{encoded(b'[' * 4000)}.x",
    "not base64": "e30.é.x",
    "no audience": report_token(aud=[]),
    "two audiences": report_token(aud=[report_audience(UID), "https://api"]),
    "the API server's audience": report_token(aud=["https://kubernetes.default.svc"]),
    "no uid": report_token(job_uid=""),
    "a long audience": report_token(job_uid="x" * 500),
    "no pod": report_token(""),
    "another namespace": report_token(namespace="kube-system"),
    "an audience that is no text": report_token(job_uid="\ud800"),
    "an audience with a line feed": report_token(job_uid="x\ny"),
    "a blank in the signature": report_token(signature="x y"),
    "another alphabet in the signature": report_token(signature="\u00e9"),
}
"""Tokens that the report server must refuse without a TokenReview: the form of the token is wrong, or its claims fit no
report for a job of the namespace `team`."""


@pytest.mark.parametrize("token", REFUSED_TOKENS.values(), ids=REFUSED_TOKENS.keys())
@pytest.mark.parametrize("name", ["quickstart", "unknown"])
async def test_a_token_whose_claims_do_not_fit_is_refused_without_a_review(name: str, token: str | None) -> None:
    async with running() as world:
        status, _, _ = await answer_to(world.port, request(report_path("team", name, 2), token, body()))
        assert status == 401
        assert world.calls == []
        assert world.nothing_happened()


@pytest.mark.parametrize("name", ["quickstart", "unknown"])
@pytest.mark.parametrize("part", ["header", "claims", "signature"])
async def test_bytes_that_are_no_text_are_refused_as_every_wrong_token(name: str, part: str) -> None:
    async with running() as world:
        header, claims, signature = report_token(signature="SIGNATURE").split(".")
        whole = {"header": header, "claims": claims, "signature": signature} | {part: "PLACE"}
        sent = request(report_path("team", name, 2), ".".join(whole.values()), body()).replace(b"PLACE", b"\xff\xfe")
        assert (await answer_to(world.port, sent))[0] == 401
        assert world.calls == []
        assert world.nothing_happened()


async def test_while_no_token_can_be_reviewed_the_answers_do_not_tell_which_jobs_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_review, "MOST_WAITING", 0)
    answers = []
    for name in ("quickstart", "unknown"):
        async with running() as world:
            sent = request(report_path("team", name, 2), report_token(job_uid="guessed"), body())
            status, fields, text = await answer_to(world.port, sent)
            fields.pop("date", None)
            answers.append((status, fields, text))
            honest = request(report_path("team", "quickstart", 2), report_token(), body())
            assert (await answer_to(world.port, honest))[0] == 503
            assert world.nothing_happened()
    assert answers[0] == answers[1]
    assert answers[0][0] == 401


async def test_the_token_of_another_job_is_refused_without_a_review() -> None:
    async with running() as world:
        sent = request(report_path("team", "quickstart", 2), report_token(job_uid="another"), body())
        assert (await answer_to(world.port, sent))[0] == 401
        assert world.calls == []


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for JSON objects whose keys are often the names of claims, with values from ``inner``."""
    names = st.sampled_from(["aud", "kubernetes.io", "namespace", "pod", "uid"]) | st.text()
    return st.dictionaries(names, inner | st.just("finetune.dev/x"))


@given(st.one_of(st.text(), st.text().map(lambda text: f"e30.{encoded(text.encode(errors='replace'))}.x")))
def test_reading_the_claims_of_any_text_raises_nothing(token: str) -> None:
    assert read_claims(token) is None


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | objects(inner))
)
def test_reading_claims_of_any_shape_raises_nothing(claims: Any) -> None:
    token = f"e30.{encoded(json.dumps(claims).encode())}.x"
    read = read_claims(token)
    assert read is None or read.audience.startswith("finetune.dev/")


CALLERS: dict[str, Callable[[int], str | None]] = {
    "no token": lambda _: None,
    "the same forged token": lambda _: report_token(job_uid="guessed", signature="forged"),
    "many forged tokens": lambda number: report_token(job_uid="guessed", signature=f"forged-{number}"),
    "many guessed jobs": lambda number: report_token(job_uid=f"guess-{number}", signature="forged"),
    "another namespace": lambda _: report_token(namespace="other"),
}
"""Callers without a valid token for the namespace `team`, by name. Each caller is a function that gets the number of a
request and returns the token that the caller sends with this request, or None for no token."""


@pytest.mark.parametrize("token", CALLERS.values(), ids=CALLERS.keys())
@pytest.mark.parametrize("listed", [True, False])
async def test_the_answers_do_not_tell_which_jobs_exist(token: Callable[[int], str | None], listed: bool) -> None:
    answers = []
    for name in ("quickstart", "unknown"):
        async with running(ConnectionLimits(per_address=1000, requests_per_second=1000.0)) as world:
            world.listed = listed
            told = []
            for number in range(int(TOKENS_AT_ONCE) + 5):
                sent = request(report_path("team", name, 2), token(number), body())
                status, fields, text = await answer_to(world.port, sent)
                fields.pop("date", None)
                told.append((status, fields, text))
            answers.append(told)
            assert world.nothing_happened()
    assert answers[0] == answers[1]
    assert {status for status, _, _ in answers[0]} == {401, 429}


async def test_an_unknown_job_gets_503_until_the_jobs_are_listed_and_409_afterwards() -> None:
    async with running() as world:
        world.listed = False
        sent = request(report_path("team", "unknown", 1), report_token(job_uid="another"), body())
        status, fields, _ = await answer_to(world.port, sent)
        assert (status, fields["retry-after"]) == (503, "5")
        world.listed = True
        assert (await answer_to(world.port, sent))[0] == 409
        world.memory.stop_reporting(KEY, UID)
        unknown = await answer_to(world.port, sent)
        without_attempt = await answer_to(world.port, request(report_path("team", "quickstart", 1), sent_token(sent)))
        assert unknown[2] == without_attempt[2], "a job without an attempt is answered as a job that does not exist"
        assert world.nothing_happened()


def sent_token(sent: bytes) -> str:
    """Return the token of a request."""
    return sent.partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()


async def test_a_key_is_queued_only_after_the_review_of_its_token() -> None:
    async with running() as world:
        world.reviews.answering.clear()
        sent = request(report_path("team", "quickstart", 2), report_token(), body())
        answer = asyncio.create_task(answer_to(world.port, sent))
        while not world.reviews.asked:
            await asyncio.sleep(0.01)
        assert world.nothing_happened()
        world.reviews.answering.set()
        assert (await answer)[0] == 204
        assert world.queue.pop() == KEY


async def test_a_report_whose_attempt_ends_while_it_arrives_is_refused_and_leaves_nothing_behind() -> None:
    async with running() as world:
        sent = request(report_path("team", "quickstart", 2), report_token(), body())
        streams = await connect(world.port)
        streams[1].write(sent[:-10])
        while not world.reviews.asked:
            await asyncio.sleep(0.01)
        world.memory.forget(KEY)
        status, _, _ = await exchange(streams, sent[-10:])
        assert status == 409
        assert world.memory.job_keys() == []
        streams[1].transport.abort()


async def test_forged_tokens_for_unknown_jobs_do_not_delay_the_report_of_a_known_one() -> None:
    async with running() as world:
        world.reviews.answering.clear()
        forged = [
            request(report_path("team", f"unknown-{number}", 1), report_token(signature=f"forged-{number}"), "")
            for number in range(20)
        ]
        waiting = [asyncio.create_task(answer_to(world.port, sent)) for sent in forged]
        while len(world.reviews.asked) < token_review.REVIEWS_AT_ONCE // 2:
            await asyncio.sleep(0.01)
        honest = asyncio.create_task(
            answer_to(world.port, request(report_path("team", "quickstart", 2), report_token(), body()))
        )
        while report_token() not in world.reviews.asked:
            await asyncio.sleep(0.01)
        assert len(world.reviews.asked) <= token_review.REVIEWS_AT_ONCE // 2 + 1, "the forged ones wait for their turn"
        world.reviews.answering.set()
        assert (await honest)[0] == 204
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {401}


async def test_wrong_tokens_push_no_right_one_out_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_review, "CACHE_ENTRIES", 8)
    reviews = Reviews()
    reviewer = TokenReviewer(reviews)  # type: ignore[arg-type]
    right, audience = report_token(), report_audience(UID)
    assert await reviewer.pod_of(right, audience) is not None
    for number in range(50):
        assert await reviewer.pod_of(report_token(signature=f"forged-{number}"), audience) is None
    reviews.asked.clear()
    assert await reviewer.pod_of(right, audience) is not None
    assert reviews.asked == []


async def test_requests_with_one_token_share_one_review_and_not_too_many_reviews_wait() -> None:
    reviews = Reviews()
    reviews.answering.clear()
    reviewer = TokenReviewer(reviews)  # type: ignore[arg-type]
    audience = report_audience(UID)
    same = [asyncio.create_task(reviewer.pod_of(report_token(), audience)) for _ in range(10)]
    many = [
        asyncio.create_task(reviewer.pod_of(report_token(signature=f"forged-{number}"), audience))
        for number in range(token_review.MOST_WAITING)
    ]
    done, _ = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
    assert all(isinstance(task.exception(), token_review.ReviewUnavailableError) for task in done)
    reviews.answering.set()
    assert all(await asyncio.gather(*same))
    await asyncio.gather(*many, return_exceptions=True)
    assert reviews.asked.count(report_token()) == 1


async def test_one_address_and_one_job_cause_few_reviews_a_second() -> None:
    async with running(ConnectionLimits(per_address=1000, requests_per_second=1000.0)) as world:
        for number in range(200):
            token = report_token(job_uid=f"guess-{number}", signature="forged")
            await answer_to(world.port, request(report_path("team", "unknown", 1), token))
        assert len(world.reviews.asked) == TOKENS_AT_ONCE
        world.now += 1.0
        for number in range(100):
            token = report_token(signature=f"forged-{number}")
            await answer_to(world.port, request(report_path("team", "quickstart", 2), token), "127.0.0.2")
        assert len(world.reviews.asked) == TOKENS_AT_ONCE + 20, "of one job"
        honest = request(report_path("team", "quickstart", 2), report_token(), body())
        world.now += 1.0
        assert (await answer_to(world.port, honest, "127.0.0.3"))[0] == 204
        known = [(await answer_to(world.port, honest, "127.0.0.1"))[0] for _ in range(5)]
        assert known == [204] * 5, "a token that is known to be valid is not counted"


async def test_a_refused_caller_needs_a_new_connection_for_each_request() -> None:
    async with running() as world:
        for token in (None, report_token(signature="forged")):
            streams = await connect(world.port)
            _, fields, _ = await exchange(streams, request(report_path("team", "quickstart", 2), token))
            assert fields["connection"] == "close"
            assert await streams[0].read(1) == b""


@pytest.mark.parametrize("token", [None, report_token()])
async def test_a_compressed_body_is_not_unpacked(token: str | None) -> None:
    async with running() as world:
        bomb = gzip.compress(b" " * 50_000_000)
        head = request(report_path("team", "quickstart", 2), token, "", "Content-Encoding: gzip")
        sent = head.replace(b"Content-Length: 0", b"Content-Length: %d" % len(bomb)) + bomb
        status, _, _ = await answer_to(world.port, sent)
        assert status == (401 if token is None else 422)
        assert world.nothing_happened()


async def test_what_is_no_http_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    valid = request(report_path("team", "quickstart", 2), report_token(), "")
    async with running() as world:
        for sent in (
            b"GARBAGE\r\n\r\n",
            b"POST / HTTP/9.9\r\n\r\n",
            b"POST /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nno field\r\n\r\n",
            valid.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"no chunk\r\n",
        ):
            status, _, _ = await answer_to(world.port, sent)
            assert status in (400, 422)
        assert world.nothing_happened()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("left_out", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_a_client_that_leaves_before_its_report_has_arrived_fills_no_log(
    left_out: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = request(report_path("team", "quickstart", 2), report_token(), "", "Expect: 100-continue")
    async with running() as world:
        _, writer = streams = await connect(world.port)
        status, _, _ = await exchange(streams, head.replace(b"Content-Length: 0", left_out))
        assert status == 100, "the server waits for the body"
        writer.transport.abort()
        while b'reports_refused_total{code="408"} 1.0' not in world.metrics.render():
            await asyncio.sleep(0.01)
        assert world.nothing_happened()
    assert [record.name for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING] == []


async def test_a_valid_token_sends_few_reports_a_second() -> None:
    async with running(ConnectionLimits(requests_per_second=1000.0)) as world:
        streams = await connect(world.port)
        sent = request(report_path("team", "quickstart", 2), report_token(), body())
        statuses = [(await exchange(streams, sent))[0] for _ in range(51)]
        assert statuses == [204] * 50 + [429]
