"""A request on which no decision depends may fail: one that creates an event, lists warnings or annotates a pod. The
operator still writes the status and completes the reconcile."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import report_of

ERRORS = [
    ApiError(403, "Forbidden", "no events in this namespace"),
    ApiError(500, "InternalError", "etcd"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut off"),
    ConnectionResetError(),
    TimeoutError(),
]
EXPLAIN = ("create_event", "list_warnings", "annotate_pod")
"""Requests on which no decision depends."""


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("request_name", EXPLAIN)
async def test_a_broken_connection_at_a_request_that_explains_loses_nothing(
    request_name: str, error: Exception
) -> None:
    asked = []

    async def fails(*_: Any) -> None:
        asked.append(1)
        raise error

    server = ModelServer(job_manifest(), NOW, pods_run=request_name != "list_warnings")
    setattr(server, request_name, fails)
    memory = Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory)
    for _ in range(3):
        await operator.reconcile(KEY)
        server.pass_time(10)
    memory.store_report(KEY, UID, report_of(20), server.now)
    for _ in range(3):
        await operator.reconcile(KEY)
        server.pass_time(10)
    assert asked
    assert server.job["status"]["attempts"]["current"]["number"] == 1
    assert server.job["status"]["checkpoints"][0]["step"] == 20
