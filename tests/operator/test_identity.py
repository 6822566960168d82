"""A job is its uid: what belongs to an earlier job of the same name, or to somebody else, is never taken for its own.

The tests run `Reconciler` against `ModelServer`, an in-memory API server.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_core.api.conditions import Reason
from finetune_core.contract import CheckpointRecord, CurvePoint, Phase, Report
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.retryable import RetryableError
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.test_crashes import KEY, reconciler

OTHER_UID = "99999999-8888-7777-6666-555555555555"


def report(pod_uid: str) -> Report:
    """Return a report of a run that is nearly done."""
    checkpoint = CheckpointRecord(
        run=1, step=80, uri=f"s3://b/{UID}/80", bytes=1, manifest_sha256="a", perplexity=1.2, time=NOW
    )
    return Report(
        run=1, pod_uid=pod_uid, phase=Phase.TRAINING, ranks=2, step=80, total_steps=80, epoch=1.6,
        metrics={"loss": 0.003}, history=[CurvePoint(step=80, loss=0.003)], checkpoints=[checkpoint],
        notices=["3 rows were left out"],
    )  # fmt: skip


async def while_it_runs(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, and report its progress."""
    operator = reconciler(server, memory=memory)
    for _ in range(4):
        await operator.reconcile(KEY)
    memory.store_report(KEY, UID, report(server.pods[0]["metadata"]["uid"]), server.now)
    server.pass_time(11)
    await operator.reconcile(KEY)
    assert server.job["status"]["progress"]["step"] == 80


async def after_its_end(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, report, and end."""
    await while_it_runs(server, memory)
    server.end_pods(64)
    for _ in range(4):
        await reconciler(server, memory=memory).reconcile(KEY)
    assert server.job["status"]["completionTime"]


async def between_its_attempts(server: ModelServer, memory: Memory) -> None:
    """Let the job of ``server`` run, report, and lose its first attempt."""
    await while_it_runs(server, memory)
    server.end_pods(1)
    for _ in range(3):
        await reconciler(server, memory=memory).reconcile(KEY)
    assert "current" not in server.job["status"]["attempts"]


async def while_it_is_refused(server: ModelServer, memory: Memory) -> None:
    """Let the creation of the child of ``server``'s job be refused often, so that the job waits for a long back-off."""
    server.refuses = "exceeded quota"
    operator = reconciler(server, memory=memory)
    for _ in range(12):
        outcome = await operator.reconcile(KEY)
        server.pass_time(outcome.after or 0)
    server.refuses = ""
    assert memory.job(KEY, UID).failures > 1


PASTS = (while_it_runs, after_its_end, between_its_attempts, while_it_is_refused)


def recreate(server: ModelServer) -> None:
    """Delete the job and create it again under the same name, as `kubectl replace --force` does."""
    fresh = job_manifest()
    fresh["metadata"] |= {"uid": OTHER_UID, "resourceVersion": "700"}
    server.job, server.pods, server.children, server.config_maps = fresh, [], {}, {}


async def lives(server: ModelServer, memory: Memory) -> list[Any]:
    """Return what the operator writes and answers in the first looks at the job of ``server``."""
    operator, found = reconciler(server, memory=memory), []
    for _ in range(6):
        outcome = await operator.reconcile(KEY)
        found.append((copy.deepcopy(server.job.get("status")), sorted(server.children), outcome))
    return found


@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
async def test_a_job_created_again_under_the_same_name_lives_as_if_no_other_job_had_been(past: Any) -> None:
    server, memory = ModelServer(job_manifest(), NOW), Memory(lambda: server.now.timestamp())
    await past(server, memory)
    recreate(server)
    untouched = ModelServer(copy.deepcopy(server.job), server.now)
    # The model server counts versions and pods, and names of the two servers are to be equal.
    untouched._version, untouched._generation, untouched.created = (
        server._version,
        server._generation,
        [*server.created],
    )
    again = await lives(server, memory)
    assert again == await lives(untouched, Memory())
    assert again[-1][0]["attempts"]["started"] == 1


async def test_a_late_report_of_a_deleted_job_does_not_reach_the_job_that_took_its_name() -> None:
    memory = Memory()
    memory.set_reporting_attempt(KEY, UID, ReportingAttempt(uid=UID, attempt=1, pod_uids=frozenset({"p"})))
    memory.set_reporting_attempt(KEY, OTHER_UID, ReportingAttempt(uid=OTHER_UID, attempt=1, pod_uids=frozenset({"q"})))
    assert not memory.store_report(KEY, UID, report("p"), NOW)
    assert memory.newest_report(KEY, OTHER_UID) is None
    assert memory.newest_report(KEY, UID) is None


def test_the_memory_of_a_job_starts_empty_for_another_uid() -> None:
    memory = Memory()
    old = memory.job(KEY, UID)
    old.problem, old.retry_at, old.failures = RetryableError(Reason.BACKEND_UNAVAILABLE, "no"), 300.0, 5
    old.event_created_at["Running"] = 1.0
    assert memory.job(KEY, UID) is old
    new = memory.job(KEY, OTHER_UID)
    assert (new.problem, new.retry_at, new.failures, new.event_created_at) == (None, 0.0, 0, {})
