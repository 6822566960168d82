"""Tests of leader election, also in cases that a real cluster can't produce on demand, such as clock jumps and calls
that hang.

The API server is a fake with one Lease. `test_two_replicas.py` uses a real API server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from kubernetes.aio.client import V1Lease, V1LeaseSpec, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException

from finetune_operator.process import leader_election
from finetune_operator.process.leader_election import (
    LEASE_SECONDS,
    RENEW_DEADLINE_SECONDS,
    LeaderElector,
    TimedLeaseLock,
)
from tests.operator.operators import Clock


class EndedError(Exception):
    """Raised where the elector would end the process."""


class OneLease:
    """A fake of the Lease API with one Lease; ``before`` runs before each call and can raise or wait."""

    def __init__(self) -> None:
        self.spec: V1LeaseSpec | None = None
        self.exists = True
        self.writes = 0
        self.before: Callable[[], Any] = lambda: None

    async def read_namespaced_lease(self, name: str, namespace: str) -> V1Lease:
        await self._fault()
        if not self.exists:
            missing = ApiException(status=404, reason="Not Found")
            missing.body = '{"kind": "Status", "code": 404}'
            raise missing
        return V1Lease(metadata=V1ObjectMeta(name=name, namespace=namespace), spec=self.spec)

    async def create_namespaced_lease(self, namespace: str, body: V1Lease) -> V1Lease:
        await self._fault()
        if self.exists:
            raise ApiException(status=409, reason="Conflict")
        self.exists, self.spec = True, body.spec
        self.writes += 1
        return body

    async def replace_namespaced_lease(self, name: str, namespace: str, body: V1Lease) -> V1Lease:
        await self._fault()
        self.spec = body.spec
        self.writes += 1
        return body

    async def _fault(self) -> None:
        result = self.before()
        if result is not None:
            await result

    def held_by(self, name: str) -> None:
        now = datetime.now(UTC)
        self.spec = V1LeaseSpec(holder_identity=name, lease_duration_seconds=15, acquire_time=now, renew_time=now)


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def server() -> OneLease:
    return OneLease()


@pytest.fixture
def candidate(server: OneLease, clock: Clock) -> LeaderElector:
    lease = TimedLeaseLock("operator", "system", "me_1", None, clock)
    lease.api_instance = server

    def end(code: int) -> None:
        raise EndedError(code)

    return LeaderElector(lease, end=end, clock=clock)


def nothing() -> None:
    """Do nothing. The tests pass this function to `LeaderElector.acquire`, which calls it after each try that had no
    error."""


async def test_an_empty_lease_is_taken_at_once(candidate: LeaderElector, server: OneLease) -> None:
    await candidate.acquire(nothing)
    assert server.spec is not None
    assert server.spec.holder_identity == "me_1"
    candidate.check()


def test_nothing_may_be_written_without_the_lease(candidate: LeaderElector) -> None:
    with pytest.raises(EndedError):
        candidate.check()


async def test_a_leader_that_stood_still_may_write_nothing(candidate: LeaderElector, clock: Clock) -> None:
    await candidate.acquire(nothing)
    clock.now += RENEW_DEADLINE_SECONDS - 0.1
    candidate.check()
    clock.now += 0.2
    with pytest.raises(EndedError):
        candidate.check()


async def test_a_wall_clock_set_forward_takes_no_lease_from_its_holder(
    server: OneLease, clock: Clock, candidate: LeaderElector, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.held_by("other_1")
    assert not await candidate._try()
    jump = time.time() + 3600
    monkeypatch.setattr("kubernetes.aio.leaderelection.leaderelection.time.time", lambda: jump)
    assert not await candidate._try()
    assert server.writes == 0
    clock.now += LEASE_SECONDS
    assert await candidate._try()


async def test_a_leader_that_finds_another_holder_ends(
    server: OneLease, candidate: LeaderElector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_election, "RETRY_SECONDS", 0.0)
    await candidate.acquire(nothing)
    server.held_by("other_1")
    with pytest.raises(EndedError):
        await candidate.renew_forever()


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientConnectionError("refused"),
        ConnectionResetError("reset"),
        TimeoutError(),
        ApiException(status=500, reason="Internal Server Error"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_counts_as_not_renewed_until_the_deadline(
    server: OneLease, clock: Clock, candidate: LeaderElector, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(leader_election, "RETRY_SECONDS", 0.0)
    await candidate.acquire(nothing)
    tries = []

    def fail() -> None:
        tries.append(clock.now)
        clock.now += 3
        raise error

    server.before = fail
    with pytest.raises(EndedError):
        await candidate.renew_forever()
    assert len(tries) == 4  # the tries are at 0, 3, 6 and 9 s, because the deadline is 10 s


async def test_a_call_that_hangs_is_given_up(
    server: OneLease, candidate: LeaderElector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_election, "CALL_SECONDS", 0.01)
    server.before = lambda: asyncio.sleep(60)
    assert not await candidate._try()


async def test_a_released_lease_has_no_holder_and_a_foreign_one_is_left_alone(
    server: OneLease, candidate: LeaderElector
) -> None:
    await candidate.acquire(nothing)
    await candidate.release()
    assert server.spec is not None
    assert server.spec.holder_identity is None
    await candidate.acquire(nothing)
    server.held_by("other_1")
    await candidate.release()
    assert server.spec.holder_identity == "other_1"


async def test_a_lease_that_does_not_exist_is_created_once_every_former_leader_has_ended(
    server: OneLease, clock: Clock, candidate: LeaderElector
) -> None:
    server.exists = False
    assert not await candidate._try()
    clock.now += LEASE_SECONDS - 0.1
    assert not await candidate._try()
    assert server.writes == 0
    clock.now += 0.1
    assert await candidate._try()
    assert server.spec is not None
    assert server.spec.holder_identity == "me_1"


async def test_a_leader_creates_its_deleted_lease_again_at_once(server: OneLease, candidate: LeaderElector) -> None:
    await candidate.acquire(nothing)
    server.exists = False
    assert await candidate._try()
    assert server.exists


async def test_a_leader_whose_deleted_lease_was_created_by_another_replica_ends(
    server: OneLease, candidate: LeaderElector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_election, "RETRY_SECONDS", 0.0)
    await candidate.acquire(nothing)
    server.exists = False

    def taken() -> None:
        if not server.exists:
            server.exists = True
            server.held_by("other_1")

    server.before = taken
    with pytest.raises(EndedError):
        await candidate.renew_forever()


async def test_a_replica_that_released_the_lease_does_not_create_it_at_once(
    server: OneLease, candidate: LeaderElector
) -> None:
    await candidate.acquire(nothing)
    await candidate.release()
    server.exists = False
    assert not await candidate._try()


async def test_only_a_lease_that_is_missing_without_a_break_is_created(
    server: OneLease, clock: Clock, candidate: LeaderElector
) -> None:
    server.exists = False
    assert not await candidate._try()
    clock.now += LEASE_SECONDS
    server.exists = True
    server.held_by("other_1")
    assert not await candidate._try()
    server.exists = False
    assert not await candidate._try()
    assert server.writes == 0
