"""Tests of the report server: accepted reports, and the HTTP status and metric of rejected reports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_core.contract import REPORT_LIMIT_BYTES, CheckpointRecord, Phase, Report, report_audience, report_path
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports.server import ReportServer
from finetune_operator.reports.token_review import TokenPod, TokenReviewer
from tests.operator.builders import NOW, UID
from tests.operator.operators import KEY
from tests.operator.report_tokens import Reviews, encoded, report_token

PATH = report_path("team", "quickstart", 2)


GOOD, PEER = report_token(), report_token("pod-9")
STOLEN, FAR = report_token(signature="forged"), report_token(namespace="other")


def body(**changes: Any) -> str:
    report = Report(
        run=1,
        pod_uid="pod-0",
        phase=Phase.TRAINING,
        ranks=2,
        step=5,
        total_steps=10,
        epoch=0.5,
        metrics={"loss": 1.5},
        history=[],
        checkpoints=[],
    )
    return report.model_copy(update=changes).to_json()


@pytest.fixture
def reviews() -> Reviews:
    return Reviews()


def known_attempt() -> ReportingAttempt:
    """Return the attempt that may report in these tests."""
    return ReportingAttempt(uid=UID, attempt=2, pod_uids=frozenset({"pod-0", "pod-1"}))


@pytest.fixture
def memory() -> Memory:
    memory = Memory()
    memory.set_reporting_attempt(KEY, UID, known_attempt())
    return memory


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def queue() -> WorkQueue:
    return WorkQueue()


@pytest.fixture
async def client(
    reviews: Reviews, memory: Memory, metrics: Metrics, queue: WorkQueue
) -> AsyncIterator[TestClient[Any, Any]]:
    reviewer = TokenReviewer(reviews)  # type: ignore[arg-type]
    server = ReportServer(memory=memory, queue=queue, reviewer=reviewer, metrics=metrics, now=lambda: NOW)
    async with TestClient(TestServer(server.application())) as client:
        yield client


async def post(client: TestClient[Any, Any], token: str | None, data: str, path: str = PATH) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with client.post(path, data=data, headers=headers) as response:
        return response.status


async def test_a_report_of_rank_0_is_stored_and_queues_the_job(
    client: TestClient[Any, Any], memory: Memory, queue: WorkQueue
) -> None:
    assert await post(client, GOOD, body()) == 204
    report = memory.newest_report(KEY, UID)
    assert report is not None
    assert report.step == 5
    assert queue.pop() == KEY


@pytest.mark.parametrize(
    ("token", "data", "path", "status"),
    [
        (None, body(), PATH, 401),
        (STOLEN, body(), PATH, 401),
        (PEER, body(pod_uid="pod-9"), PATH, 403),
        (FAR, body(), PATH, 401),
        (report_token(job_uid="another"), body(), PATH, 401),
        (f"a.{encoded(b'[]')}.c", body(), PATH, 401),
        (GOOD, body(pod_uid="pod-1"), PATH, 403),
        (GOOD, body(), report_path("team", "quickstart", 1), 409),
        (GOOD, body(), report_path("team", "unknown", 1), 409),
        (GOOD, body(), report_path("team", "Unknown", 1), 404),
        (GOOD, body(notices=["x" * 500] * 8) + " " * REPORT_LIMIT_BYTES, PATH, 413),
        (GOOD, "{", PATH, 422),
        (GOOD, body().replace("1.5", "NaN"), PATH, 422),
        (GOOD, body().replace('"step":5', '"step":-5'), PATH, 422),
        (GOOD, body()[:-1] + ',"surprise":1}', PATH, 422),
        (GOOD, body(notices=["x" * 513]), PATH, 422),
    ],
)
async def test_a_refused_report_is_counted_and_never_shown(
    client: TestClient[Any, Any], memory: Memory, metrics: Metrics, token: str | None, data: str, path: str, status: int
) -> None:
    assert await post(client, token, data, path) == status
    assert memory.newest_report(KEY, UID) is None
    assert f'finetune_reports_refused_total{{code="{status}"}} 1.0' in metrics.render().decode()


async def test_a_token_is_reviewed_once_a_minute(client: TestClient[Any, Any], reviews: Reviews) -> None:
    for token in (GOOD, GOOD, STOLEN, STOLEN):
        await post(client, token, body())
    assert reviews.asked == [GOOD, STOLEN]


def test_a_new_attempt_forgets_the_report_of_the_old_one(memory: Memory) -> None:
    memory.store_report(KEY, UID, Report.model_validate_json(body()), NOW)
    memory.set_reporting_attempt(KEY, UID, ReportingAttempt(uid=UID, attempt=2, pod_uids=frozenset()))
    assert memory.newest_report(KEY, UID) is not None
    memory.set_reporting_attempt(KEY, UID, ReportingAttempt(uid=UID, attempt=3, pod_uids=frozenset()))
    assert memory.newest_report(KEY, UID) is None


async def test_a_token_is_reviewed_again_after_a_minute() -> None:
    reviews = Reviews()
    now = [0.0]
    reviewer = TokenReviewer(reviews, clock=lambda: now[0])  # type: ignore[arg-type]
    assert await reviewer.pod_of(GOOD, report_audience(UID)) == TokenPod(namespace="team", name="p", uid="pod-0")
    now[0] = 61.0
    await reviewer.pod_of(GOOD, report_audience(UID))
    await reviewer.pod_of(GOOD, report_audience("another"))
    assert len(reviews.asked) == 3


KUBEFLOW_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/quickstart/status"
KUBEFLOW_BODY = (
    '{"trainerStatus": {"progressPercentage": 5, "lastUpdatedTime": "2026-11-24T12:00:00Z", '
    '"metrics": [{"name": "current_step", "value": "5"}, {"name": "total_steps", "value": "100"}]}}'
)


async def test_kubeflows_protocol_is_taken_with_200_and_the_same_token(
    client: TestClient[Any, Any], memory: Memory
) -> None:
    assert await post(client, GOOD, KUBEFLOW_BODY, KUBEFLOW_PATH) == 200
    report = memory.newest_report(KEY, UID)
    assert report is not None
    assert (report.step, report.total_steps, report.pod_uid) == (5, 100, "pod-0")


@pytest.mark.parametrize(
    ("token", "data", "code"),
    [
        (None, KUBEFLOW_BODY, 401),
        (STOLEN, KUBEFLOW_BODY, 401),
        (PEER, KUBEFLOW_BODY, 403),
        (FAR, KUBEFLOW_BODY, 401),
        (GOOD, KUBEFLOW_BODY.replace('"5"', '"NaN"'), 422),
        (GOOD, "{", 422),
        (GOOD, KUBEFLOW_BODY + " " * REPORT_LIMIT_BYTES, 413),
    ],
)
async def test_kubeflows_protocol_is_refused_for_the_same_reasons(
    client: TestClient[Any, Any], memory: Memory, metrics: Metrics, token: str | None, data: str, code: int
) -> None:
    assert await post(client, token, data, KUBEFLOW_PATH) == code
    assert memory.newest_report(KEY, UID) is None
    assert f'finetune_reports_refused_total{{code="{code}"}} 1.0' in metrics.render().decode()


async def test_a_stock_report_is_rejected_once_the_attempt_sends_its_own_reports(
    client: TestClient[Any, Any], memory: Memory
) -> None:
    assert await post(client, GOOD, body()) == 204
    assert await post(client, GOOD, KUBEFLOW_BODY, KUBEFLOW_PATH) == 409
    report = memory.newest_report(KEY, UID)
    assert report is not None
    assert report.metrics == {"loss": 1.5}


async def test_reports_wait_out_an_api_server_that_reviews_no_token(
    reviews: Reviews, memory: Memory, metrics: Metrics, queue: WorkQueue
) -> None:
    async def fails(token: str, audience: str) -> dict[str, Any]:
        raise ApiError(500, "InternalError", "etcd")

    reviews.review_token = fails  # type: ignore[method-assign]
    server = ReportServer(memory=memory, queue=queue, reviewer=TokenReviewer(reviews), metrics=metrics)  # type: ignore[arg-type]
    async with TestClient(TestServer(server.application())) as client:
        assert await post(client, GOOD, body()) == 503


async def test_reports_with_only_new_numbers_queue_no_reconcile_before_the_next_status_write(
    client: TestClient[Any, Any], memory: Memory, queue: WorkQueue
) -> None:
    memory.job(KEY, UID).status_written_at = (
        time.monotonic() + 3600
    )  # the last status write is in the future, so that on a slow machine the 10 s after it are not over too early
    assert await post(client, GOOD, body()) == 204
    assert queue.pop() == KEY, "the first report of an attempt is reconciled at once"
    queue.done(KEY)
    assert await post(client, GOOD, body(step=6)) == 204
    assert (queue.pop(), len(queue._due)) == (None, 1)
    saved = CheckpointRecord(run=1, step=6, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=NOW)
    assert await post(client, GOOD, body(step=6, checkpoints=[saved])) == 204
    assert queue.pop() == KEY, "a new checkpoint is reconciled at once"


async def test_a_pod_that_may_not_report_can_not_cause_more_reconciles_than_one_that_may(
    client: TestClient[Any, Any], memory: Memory, queue: WorkQueue
) -> None:
    reconciled = 0
    began = time.monotonic()
    for _ in range(50):
        assert await post(client, PEER, body(pod_uid="pod-9")) == 403
        while (key := queue.pop()) is not None:
            memory.begin_reconcile(key)
            queue.done(key)
            reconciled += 1
    # The operator may reconcile a job three times at once for its reports, and then once every 10 s. The latter happens
    # here only on a slow machine.
    assert 1 <= reconciled <= 3 + (time.monotonic() - began) / 10
