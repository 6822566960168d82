"""Leader election among the replicas of the operator by a Lease, after the model of client-go's leaderelection.

Candidates wait until they acquire the Lease. A leader that can't renew the Lease in time, or finds another holder, ends
its process at once. `application.py` calls `LeaderElector`. `LeaderElector.check` is called before every write, except
the writes of the Lease itself.

The Kubernetes client library implements the election. This module adds a time limit for every call, treats an error as
a failed renewal (the library would end the election unnoticed), and measures time with the monotonic clock. That clock
runs on while the process is frozen, and does not jump when the machine's time is set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import aiohttp
from kubernetes.aio.client import V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

logger = logging.getLogger(__name__)

LEASE_SECONDS: Final = 15.0
"""Seconds without a renewal after which a candidate takes over the Lease."""
RENEW_DEADLINE_SECONDS: Final = 10.0
"""Seconds without a renewal after which a leader ends its process: five seconds before another replica may lead."""
RETRY_SECONDS: Final = 2.0
CALL_SECONDS: Final = 3.0
"""Time limit in seconds of each call that reads or writes the Lease."""
LOST_EXIT_CODE: Final = 1


class TimedLeaseLock(LeaseLock):  # type: ignore[misc]
    """Reads and writes the Lease for the client library. No call takes longer than three seconds."""

    def __init__(self, name: str, namespace: str, identity: str, client: Any, clock: Callable[[], float]) -> None:
        """Use the Lease ``namespace/name`` with ``identity`` as the holder identity. The Lease need not exist yet.

        ``client`` is what `lease_client` returns. ``clock`` returns monotonic seconds.
        """
        super().__init__(name, namespace, identity, client)
        self._clock = clock
        self._is_mine = False
        """Whether this process held the Lease at the last call that read or wrote it."""
        self._missing_since: float | None = None
        self._record: tuple[str | None, str | None] | None = None
        self._record_changed_at = 0.0
        self.last_error = ""
        """Why the last call failed; empty where it succeeded."""

    @property
    def holder(self) -> str | None:
        """Identity of the Lease's holder when the Lease was last read. None or empty where the Lease had no holder, or
        was never read."""
        return self._record[0] if self._record else None

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        """Read the Lease; return (True, record), or (False, ApiException) where the call failed.

        Also remembers, by the monotonic clock of this process, when the record was last seen to change, and since when
        the Lease has been missing.
        """
        try:
            async with asyncio.timeout(CALL_SECONDS):
                found, answer = await super().get(name, namespace)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found, answer = False, ApiException(status=0, reason=str(error) or type(error).__name__)
        self.last_error = "" if found else f"it can't be read: {answer.status} {answer.reason}"
        if found or answer.status != HTTPStatus.NOT_FOUND:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = self._clock()
        if found:
            self._is_mine = answer.holder_identity == self.identity
            record = (answer.holder_identity, answer.renew_time)
            if record != self._record:
                self._record, self._record_changed_at = record, self._clock()
        return found, answer

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        """Create the missing Lease with this process as holder; return False where that is too early or fails.

        ``election_record`` contains the holder and the times for the Lease. The process that held the Lease creates it
        again at once after a deletion. Every other process waits until the Lease has been missing for 15 s. By then a
        leader that could not reach the API server has ended, so that there are never two leaders. The first start of a
        new installation takes these 15 s as well.
        """
        missing_since = self._clock() if self._missing_since is None else self._missing_since
        if not self._is_mine and self._clock() - missing_since < LEASE_SECONDS:
            self.last_error = f"it does not exist; it is created once it has been missing for {LEASE_SECONDS:.0f} s"
            return False
        # The library's own method is not called, because it passes an argument that the library's client refuses.
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self.api_instance.create_namespaced_lease(namespace, lease)
        except (ApiException, aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = f"{error.status} {error.reason}" if isinstance(error, ApiException) else str(error)
            self.last_error = f"it can't be created: {reason or type(error).__name__}"
            return False
        self.last_error, self._is_mine = "", True
        return True

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        """Acquire or renew the Lease; return False where that fails, or where another replica holds or took the Lease.

        ``updated_record`` contains the new holder and times of the Lease.
        """
        is_held_by_another = self.holder not in (None, "", self.identity)
        if is_held_by_another and self._clock() - self._record_changed_at < LEASE_SECONDS:
            return False  # the library compares wall clock times, and a clock that is set forward would mislead it
        try:
            async with asyncio.timeout(CALL_SECONDS):
                updated = bool(await super().update(name, namespace, updated_record))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.last_error = f"it can't be written: {str(error) or type(error).__name__}"
            return False
        self.last_error = "" if updated else "the API server refused the update"
        self._is_mine = updated or self._is_mine
        return updated

    async def clear_holder(self) -> None:
        """Remove this process as holder of the Lease, so that another candidate need not wait until the Lease expires.

        Raises the exceptions of the client library where a request fails, and TimeoutError after three seconds.
        """
        async with asyncio.timeout(CALL_SECONDS):
            lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
            if lease.spec is None or lease.spec.holder_identity != self.identity:
                return
            lease.spec.holder_identity = None
            await self.api_instance.replace_namespaced_lease(name=self.name, namespace=self.namespace, body=lease)
            self._is_mine = False


def end_process(code: int) -> None:
    """End the process at once with exit code ``code``. No clean-up runs, because it might write to the API server."""
    logging.shutdown()
    os._exit(code)


class LeaderElector:
    """Acquires, renews and releases the Lease."""

    def __init__(
        self,
        lease: TimedLeaseLock,
        *,
        end: Callable[[int], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the election; the Lease is not acquired yet.

        The function ``end`` is called with an exit code when the Lease is lost, and must not return. ``clock`` returns
        monotonic seconds.
        """
        self._lease = lease
        self._end = end
        self._clock = clock
        self._renewed_at: float | None = None
        self._election = LeaderElection(
            Config(
                lease,
                lease_duration=int(LEASE_SECONDS),
                renew_deadline=RENEW_DEADLINE_SECONDS,
                retry_period=RETRY_SECONDS,
                # The callbacks do nothing. `application.py` runs the leader's work itself, because the library would
                # not notice an error in a callback.
                onstarted_leading=_no_callback,
                onstopped_leading=_no_callback,
            )
        )

    @property
    def is_leader(self) -> bool:
        """Whether this process has acquired the Lease and has not released it since."""
        return self._renewed_at is not None

    def age(self) -> float:
        """Return the seconds since this process last renewed the Lease; 0.0 where this process is not the leader."""
        return self._clock() - self._renewed_at if self._renewed_at is not None else 0.0

    async def acquire(self, lease_read: Callable[[], None]) -> None:
        """Wait without limit until this process holds the Lease; call ``lease_read`` after tries without an error."""
        logged = ""
        while not await self._try():
            state = self._lease.last_error or f"{self._lease.holder} holds it"
            if not self._lease.last_error:
                lease_read()
            if state != logged:
                logger.info("waiting for the Lease %s: %s", self._lease.name, state)
                logged = state
            await asyncio.sleep(RETRY_SECONDS)
        lease_read()
        logger.info("%s leads: it got the Lease %s", self._lease.identity, self._lease.name)

    async def renew_forever(self) -> None:
        """Renew the Lease every 2 s. Never returns.

        The process ends where no renewal succeeds for 10 s, or where another replica holds the Lease.
        """
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            self.check()
            try:
                # The time-out is the time that is left until the deadline, so that the process ends at the deadline
                # even if a call hangs.
                async with asyncio.timeout(RENEW_DEADLINE_SECONDS - self.age()):
                    renewed = await self._try()
            except TimeoutError:
                renewed = False
            if not renewed and self._lease.holder not in (None, "", self._lease.identity):
                self._lost(f"{self._lease.holder} holds it")
            self.check()

    def check(self) -> None:
        """End the process unless it is the leader and has renewed the Lease within the last 10 s.

        `kube/fencing.py` calls this method before every write, except the writes of the Lease itself.
        """
        if self.is_leader and self.age() < RENEW_DEADLINE_SECONDS:
            return
        self._lost(f"not renewed for {self.age():.0f} s ({self._lease.last_error or 'the process stood still'})")

    async def release(self) -> None:
        """Release the Lease. The caller must make sure that this process writes nothing afterwards."""
        if not self.is_leader:
            return
        self._renewed_at = None
        try:
            await self._lease.clear_holder()
        except (ApiException, aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.warning("the Lease was not given back, the next leader waits for its end: %s", error)
        else:
            logger.info("the Lease %s was given back", self._lease.name)

    async def _try(self) -> bool:
        # The time of the renewal is taken before the requests, so that the Lease never expires earlier than assumed.
        asked = self._clock()
        if not await self._election.try_acquire_or_renew():
            return False
        self._renewed_at = asked
        return True

    def _lost(self, why: str) -> None:
        logger.error("the Lease %s is lost, the process ends: %s", self._lease.name, why)
        self._end(LOST_EXIT_CODE)


async def _no_callback() -> None:
    """Do nothing. The library requires a callback for the start and for the end of leadership."""
