"""No more preflight checks run at the same time than `--max-preflights` allows, and every job gets its turn."""

from __future__ import annotations

import contextlib
import copy
import random
from datetime import datetime
from typing import Any

import pytest

from finetune_core.contract.preflight_result import PreflightResult
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.queue.key import Key
from finetune_operator.queue.preflight_slots import RUN_SECONDS, START_SECONDS, PreflightSlots
from finetune_operator.reconcile import Reconciler
from tests.operator.builders import NOW, job_manifest
from tests.operator.model import Manifest, ModelServer
from tests.operator.operators import Clock, reconciler

A, B, C, D = (Key("team", name) for name in "abcd")


def slots(limit: int) -> tuple[PreflightSlots, list[Key], Clock]:
    woken: list[Key] = []
    clock = Clock()
    return PreflightSlots(limit, wake=woken.append, clock=clock), woken, clock


def test_a_job_beyond_the_limit_waits_and_is_woken_when_its_turn_comes() -> None:
    line, woken, _ = slots(2)
    assert [line.acquire(key) for key in (A, B, C, D, A)] == [True, True, False, False, True]
    line.release(A)
    assert woken == [C]
    assert (line.acquire(C), line.acquire(D)) == (True, False)


def test_a_job_that_no_longer_wants_a_check_leaves_the_line() -> None:
    line, woken, _ = slots(1)
    assert [line.acquire(key) for key in (A, B, C)] == [True, False, False]
    line.release(B)
    line.release(A)
    assert woken == [C]


def test_a_namespace_with_many_jobs_does_not_keep_the_others_waiting() -> None:
    line, woken, _ = slots(2)
    crowd = [Key("crowd", f"job-{number}") for number in range(50)]
    assert [line.acquire(key) for key in crowd].count(True) == 2
    assert not line.acquire(A)
    line.release(crowd[0])
    assert woken == [A]


def test_slots_of_jobs_that_are_not_seen_again_become_free() -> None:
    line, _, clock = slots(1)
    assert (line.acquire(A), line.acquire(B)) == (True, False)
    clock.now = START_SECONDS
    assert line.acquire(B)
    line.occupy(B)
    clock.now += RUN_SECONDS - 1
    assert not line.acquire(A)
    clock.now += 1
    assert line.acquire(A)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_gives_out_more_slots_than_there_are_or_forgets_a_job(seed: int) -> None:
    choose = random.Random(seed)
    limit = choose.randint(1, 5)
    line, woken, clock = slots(limit)
    keys = [Key(f"team-{number % 3}", f"job-{number}") for number in range(30)]
    running: set[Key] = set()
    left = set(keys)
    for _ in range(5000):
        clock.now += choose.random()
        asks = woken.pop() if woken else choose.choice(keys)
        if asks in running and choose.random() < 0.3:
            running.discard(asks)
            left.discard(asks)
            line.release(asks)
        elif asks in left and line.acquire(asks):
            line.occupy(asks)
            running.add(asks)
        for key in running:
            line.occupy(key)
        assert len(running) <= limit
    assert left <= running


class Fleet:
    """Takes the place of the API server. It has several namespaces, each with one job and its objects."""

    def __init__(self, names: str) -> None:
        self.servers = {name: ModelServer(self._job(name), NOW) for name in names}
        self.keys = [Key(name, "quickstart") for name in names]

    @staticmethod
    def _job(name: str) -> Manifest:
        manifest = job_manifest(runPolicy={"preflight": "Run"})
        manifest["metadata"] |= {"namespace": name, "uid": f"{name}1111111-2222-3333-4444-555555555555"}
        return manifest

    async def list_pods(self, namespace: str | None, selector: str) -> list[Manifest]:
        servers = self.servers.values() if namespace is None else [self.servers[namespace]]
        return [
            pod for server in servers for pod in await server.list_pods(server.job["metadata"]["namespace"], selector)
        ]

    def __getattr__(self, name: str) -> Any:
        async def call(where: Any, *arguments: Any) -> Any:
            namespace = where if isinstance(where, str) else None
            if namespace is None:
                namespace = where.namespace if isinstance(where, Key) else where["metadata"]["namespace"]
            return await getattr(self.servers[namespace], name)(where, *arguments)

        return call

    @property
    def checks(self) -> list[str]:
        """Names of the namespaces in which a preflight pod exists."""
        return [name for name, server in self.servers.items() if server.checks]

    def operator(self, limit: int, namespaces: tuple[str, ...] = ()) -> Reconciler:
        """Return the reconciler of an operator that has just started and lets ``limit`` preflight checks run at the
        same time."""
        return reconciler(self, preflight="Run", preflight_slots=PreflightSlots(limit), namespaces=namespaces)

    @property
    def now(self) -> datetime:
        return next(iter(self.servers.values())).now

    async def reconcile_all(self, operator: Reconciler, times: int = 5) -> None:
        for _ in range(times):
            for key in self.keys:
                await operator.reconcile(key)


async def test_jobs_beyond_the_limit_say_that_they_wait_for_their_turn() -> None:
    fleet = Fleet("abcd")
    operator = fleet.operator(2)
    await fleet.reconcile_all(operator)
    for server in fleet.servers.values():
        server.pass_time(10)  # a change of a message alone is written ten seconds after the last write
    await fleet.reconcile_all(operator)
    assert fleet.checks == ["a", "b"]
    conditions = {one["type"]: one for one in fleet.servers["c"].job["status"]["conditions"]}
    assert (conditions["Accepted"]["status"], conditions["Accepted"]["reason"]) == ("Unknown", "Preflight")
    assert "waits for its turn: 2 checks" in conditions["Succeeded"]["message"]
    fleet.servers["a"].end_check(0, PreflightResult(findings=[]).to_termination_message())
    await fleet.reconcile_all(operator)
    assert fleet.checks == ["b", "c"]


async def test_the_pending_deadline_does_not_run_while_a_job_waits_for_its_first_turn() -> None:
    fleet = Fleet("ab")
    operator = fleet.operator(1)
    fleet.servers["b"].set_policy(pendingDeadlineSeconds=60)
    for _ in range(20):
        await fleet.reconcile_all(operator, times=1)
        for server in fleet.servers.values():
            server.pass_time(10)
    assert "preflight" not in fleet.servers["b"].job["status"]
    fleet.servers["a"].end_check(0, PreflightResult(findings=[]).to_termination_message())
    await fleet.reconcile_all(operator)
    assert fleet.checks == ["b"]


async def test_an_operator_that_starts_counts_the_checks_that_run_already() -> None:
    fleet = Fleet("abcd")
    await fleet.reconcile_all(fleet.operator(2))
    fleet.keys.reverse()  # the new operator first reconciles the jobs that wait
    await fleet.reconcile_all(fleet.operator(2), times=1)
    assert fleet.checks == ["a", "b"]


async def test_a_pod_that_does_not_start_takes_no_slot_after_a_minute() -> None:
    fleet = Fleet("abc")
    operator = fleet.operator(1)
    await fleet.reconcile_all(operator)
    assert fleet.checks == ["a"]
    (stuck,) = fleet.servers["a"].checks
    stuck["status"] = {"phase": "Pending", "containerStatuses": []}
    for server in fleet.servers.values():
        server.pass_time(61)
    await fleet.reconcile_all(operator)
    assert fleet.checks == ["a", "b"]


async def test_a_namespace_that_may_not_be_listed_holds_back_no_other() -> None:
    fleet = Fleet("ab")

    async def refused(namespace: str | None, selector: str) -> list[Manifest]:
        if namespace == "gone":
            raise ApiError(403, "Forbidden", "pods is forbidden")
        return await Fleet.list_pods(fleet, namespace, selector)

    fleet.list_pods = refused  # type: ignore[method-assign]
    await fleet.reconcile_all(fleet.operator(2, namespaces=("gone", "a", "b")))
    assert fleet.checks == ["a", "b"]


@pytest.mark.parametrize("owner", ["A", "a.b", "../x", "x" * 200, "a\n", ""])
async def test_a_pod_whose_owner_can_be_no_job_holds_back_no_check(owner: str) -> None:
    await assert_held_back_by_no_pod({"name": owner, "uid": "foreign"}, {})


async def test_a_foreign_pod_that_ends_in_millennia_holds_back_no_check() -> None:
    """Anybody may create a pod with the labels of a check, and delete the pod with any grace period."""
    ending = {"deletionTimestamp": "2200-11-24T12:00:00Z", "deletionGracePeriodSeconds": 10**11}
    await assert_held_back_by_no_pod({"name": "..", "uid": "foreign"}, ending)


async def assert_held_back_by_no_pod(owner: dict[str, str], metadata: dict[str, Any]) -> None:
    """Assert that a new operator, which may run two checks at a time, starts the checks of two jobs, although the API
    server lists a foreign preflight pod.

    ``owner`` replaces fields of the foreign pod's owner reference, and ``metadata`` replaces fields of its metadata.
    """
    fleet = Fleet("ab")
    await fleet.reconcile_all(fleet.operator(1), times=3)
    foreign = copy.deepcopy(fleet.servers["a"].checks[0])
    foreign["metadata"] |= metadata
    foreign["metadata"]["ownerReferences"][0] |= owner
    fleet.servers["a"].checks = []

    async def listed(namespace: str | None, selector: str) -> list[Manifest]:
        return [foreign, *await Fleet.list_pods(fleet, namespace, selector)]

    fleet.list_pods = listed  # type: ignore[method-assign]
    await fleet.reconcile_all(fleet.operator(2))
    assert fleet.checks == ["a", "b"]


@pytest.mark.parametrize("error", [ApiError(409, "Conflict", "quota"), ApiError(500, "InternalError", "etcd")])
async def test_a_job_whose_pod_can_never_be_created_keeps_no_slot(error: ApiError) -> None:
    fleet = Fleet("ab")
    operator = fleet.operator(1)

    async def fails(manifest: Manifest) -> Manifest:
        raise error

    fleet.servers["a"].create_pod = fails  # type: ignore[method-assign]
    for _ in range(5):
        for key in fleet.keys:
            with contextlib.suppress(ApiError):
                await operator.reconcile(key)
    assert fleet.checks == ["b"]
