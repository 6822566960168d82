"""A checkpoint that the pods commit last, after SIGTERM, counts in the decision that follows, even if the status does
not show the checkpoint yet."""

from __future__ import annotations

import pytest

from finetune_operator.queue.memory import Memory
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.test_identity import report


@pytest.mark.parametrize("order", [{"cancel": True}, {"suspend": True}], ids=str)
async def test_the_checkpoint_that_pods_commit_after_sigterm_is_named(order: dict[str, bool]) -> None:
    server = ModelServer(job_manifest(), NOW, saving=5)
    memory = Memory(lambda: server.now.timestamp())
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    server.set_policy(**order)
    while server.children:
        await operator.reconcile(KEY)
    assert not server.job["status"].get("checkpoints")
    committed = report(server.pods[0]["metadata"]["uid"])
    memory.store_report(KEY, UID, committed, server.now)
    server.pass_time(6)
    assert not server.pods
    for _ in range(4):
        await operator.reconcile(KEY)
    if "suspend" in order:
        server.set_policy(suspend=False, cancel=True)
        for _ in range(4):
            await operator.reconcile(KEY)
    status = server.job["status"]
    assert [item["uri"] for item in status["checkpoints"]] == [committed.checkpoints[-1].uri]
    (succeeded,) = [item for item in status["conditions"] if item["type"] == "Succeeded"]
    assert (succeeded["status"], succeeded["reason"]) == ("False", "Cancelled")
    assert committed.checkpoints[-1].uri in succeeded["message"]
