"""How often the operator reads warning events while a pod of a job does not start."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from finetune_operator.queue.memory import Memory
from finetune_operator.queue.retryable import EVENTS_EVERY_SECONDS
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler

WARNING = {"reason": "FailedMount", "note": 'secret "storage" not found', "eventTime": NOW.isoformat()}


@pytest.mark.parametrize("policy", [{"preflight": "Run"}, {"preflight": "Skip"}], ids=["a check", "an attempt"])
async def test_events_about_pods_that_do_not_start_are_read_at_most_once_in_ten_seconds(policy: dict[str, str]) -> None:
    reads: list[float] = []
    hints: list[str] = []

    async def list_warnings(*_: Any) -> list[dict[str, str]]:
        reads.append(server.now.timestamp())
        return [WARNING]

    server = ModelServer(job_manifest(runPolicy=policy), NOW, pods_run=False)
    server.list_warnings = list_warnings  # type: ignore[method-assign, assignment]
    memory = Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory, preflight="Run")
    for _ in range(60):
        await operator.reconcile(KEY)
        for check in server.checks:
            check["status"] = {"phase": "Pending"}
        hints.append(memory.job(KEY, UID).hint)
        server.pass_time(1)
    assert len(reads) >= 2
    assert all(later - earlier >= EVENTS_EVERY_SECONDS for earlier, later in pairwise(reads))
    first = hints.index('FailedMount: secret "storage" not found')
    assert set(hints[first:]) == {hints[first]}, "the warning is known between two reads too"
