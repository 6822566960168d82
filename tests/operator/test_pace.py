"""No job is reconciled again and again without a pause: only a reconcile that wrote something asks for another at once.

The tests run `Reconciler` against `ModelServer`, with the scenarios of `scenarios.py` and with random events.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from finetune_core.api import FineTuneJobStatus
from finetune_operator import reconcile
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.state_machine import decide
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.observe.observation import JobObservation
from finetune_operator.queue.requeue import LEAST_PAUSE_SECONDS, Requeue, Write
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import Manifest, ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import SCENARIOS, checked
from tests.operator.test_invariants import likely_events

LOOK_SECONDS = 0.01
"""Shortest time in seconds between two reconciles in a test that moves the clock itself."""


class PacedReconciler:
    """Calls a reconciler, and asserts that a call without a write does not ask for another reconcile at once."""

    def __init__(self, server: ModelServer, *, other_jobs: int = 0) -> None:
        """Reconcile against ``server``; before this job, ``other_jobs`` other jobs have reserved a status write
        each."""
        self._server = server
        self._operator = reconciler(server)
        for _ in range(other_jobs):
            self._operator._writer._budget.reserve(server.now.timestamp())

    async def reconcile(self) -> Requeue:
        before = len(self._server.writes)
        requeue = await self._operator.reconcile(KEY)
        written = self._server.writes[before:]
        assert written or requeue.after is None or requeue.after >= LEAST_PAUSE_SECONDS, "at once without a write"
        return requeue


def test_a_requeue_without_a_write_can_not_ask_for_less_than_the_least_pause() -> None:
    assert Requeue(pause=0).after == Requeue(pause=-5).after == LEAST_PAUSE_SECONDS
    assert Requeue(pause=30).after == 30
    assert Requeue().after is None
    assert Requeue(write=Write("status"), pause=30).after == 0


@pytest.mark.parametrize("other_jobs", [0, 1000])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_again_at_once_follows_only_a_write(name: str, other_jobs: int) -> None:
    scenario = SCENARIOS[name]
    server = ModelServer(
        job_manifest(runPolicy=scenario.policy), NOW, refuses=scenario.refuses, pods_run=scenario.pods_run
    )
    operator = PacedReconciler(server, other_jobs=other_jobs)
    events = list(scenario.script)
    for _ in range(300):
        requeue = await operator.reconcile()
        if events and requeue.after != 0 and events[0](server):
            events.pop(0)
            continue
        server.pass_time(1 if requeue.after is None else max(1, requeue.after))
    assert not events, "the scenario did not come to its end"


@pytest.mark.parametrize("seed", range(10))
async def test_again_at_once_follows_only_a_write_for_any_order_of_events(seed: int) -> None:
    chance = random.Random(seed)
    policy = {"maxRetries": 100, "preflight": chance.choice(("Run", "Skip"))}
    server = ModelServer(job_manifest(runPolicy=policy), NOW, saving=chance.choice((0, 20, 85)))
    operator = PacedReconciler(server, other_jobs=chance.choice((0, 1000)))
    happens = [*likely_events(chance), *_events_of_a_check(chance)]
    actions, weights = zip(*happens, strict=True)
    for _ in range(300):
        await operator.reconcile()
        if chance.random() < 0.5:
            chance.choices(actions, weights)[0](server)


def _events_of_a_check(chance: random.Random) -> list[tuple[Callable[[ModelServer], Any], float]]:
    def refuse_pods(server: ModelServer) -> None:
        server.refuses_pods = chance.choice(("", "exceeded quota"))

    return [(checked(0), 2), (checked(75), 2), (checked(1), 1), (refuse_pods, 1)]


@pytest.mark.parametrize("name", SCENARIOS)
async def test_what_must_be_written_first_is_written_by_the_same_reconcile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[bool] = []

    def decide_and_record(stored: FineTuneJobStatus, seen: JobObservation) -> Decision:
        decision = decide(stored, seen)
        first.append(decision.must_be_written_first(stored))
        return decision

    monkeypatch.setattr(reconcile, "decide", decide_and_record)
    scenario = SCENARIOS[name]
    server = ModelServer(
        job_manifest(runPolicy=scenario.policy), NOW, refuses=scenario.refuses, pods_run=scenario.pods_run
    )
    operator = PacedReconciler(server, other_jobs=1000)
    events = list(scenario.script)
    found = 0
    for _ in range(300):
        first.clear()
        before = len(server.writes)
        requeue = await operator.reconcile()
        if first == [True]:
            found += 1
            assert server.writes[before:] == ["status"]
        if events and requeue.after != 0 and events[0](server):
            events.pop(0)
        else:
            server.pass_time(1 if requeue.after is None else max(1, requeue.after))
    assert found


class UnchangedServer(ModelServer):
    """Answers a status write with success and stores nothing, as if the job had that status already."""

    async def apply_status(self, _key: object, resource_version: str, _status: Manifest) -> str:
        return resource_version


async def test_a_status_write_that_changed_nothing_is_not_repeated_at_once() -> None:
    requeue = await reconciler(UnchangedServer(job_manifest(), NOW)).reconcile(KEY)
    assert requeue.after is not None
    assert requeue.after >= LEAST_PAUSE_SECONDS


class GoneServer(ModelServer):
    """Answers every deletion of a pod with 404, as if somebody else had just deleted the pod."""

    async def delete_pod(self, _namespace: str, _name: str, _uid: str) -> bool:
        return False


async def test_a_pod_that_was_gone_already_is_not_looked_for_at_once() -> None:
    server = GoneServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    operator = PacedReconciler(server)
    for _ in range(3):
        await operator.reconcile()
    server.end_check(0)
    for _ in range(10):
        await operator.reconcile()


@pytest.mark.parametrize("other_jobs", [0, 1000])
async def test_attempt_1_follows_a_passed_check_within_a_second_however_many_jobs_write(other_jobs: int) -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    operator = PacedReconciler(server, other_jobs=100 + other_jobs)
    while not server.checks:
        await operator.reconcile()
    server.pass_time(3)
    server.end_check(0)
    ended, looks = server.now, 0
    while not server.created:
        requeue = await operator.reconcile()
        looks += 1
        if not server.created:
            assert requeue.after is not None
            server.now += timedelta(seconds=max(LOOK_SECONDS, requeue.after))
    assert server.now - ended <= timedelta(seconds=1)
    assert looks <= 4


@pytest.mark.parametrize("error", [ApiError(503, "", "down"), TimeoutError(), ConnectionResetError()])
async def test_a_failed_write_asks_for_nothing_at_once(error: Exception) -> None:
    class Failing(ModelServer):
        async def apply_status(self, _key: object, _resource_version: str, _status: Manifest) -> str:
            raise error

    with pytest.raises(type(error)):
        await reconciler(Failing(job_manifest(), NOW)).reconcile(KEY)


async def test_a_preflight_pod_that_is_refused_is_said_by_the_same_reconcile() -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run"}), NOW)
    server.refuses_pods = "exceeded quota"
    operator = PacedReconciler(server)
    await operator.reconcile()
    requeue = await operator.reconcile()
    (accepted,) = (item for item in server.job["status"]["conditions"] if item["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "OutsideFailure")
    assert "exceeded quota" in accepted["message"]
    assert requeue.after == 10
