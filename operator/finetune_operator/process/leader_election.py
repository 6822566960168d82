"""Which of several operators works: the one that holds a Lease. Candidates wait here until they get it; a leader
that can't renew it in time, or finds another holder, ends its process at once.

The election itself is the client library's. What it lacks is added here: a time limit for every call, errors that
count as "not renewed" instead of ending the election unnoticed, and the monotonic clock, which also runs while the
process is frozen and does not jump when the machine's time is set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final

import aiohttp
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

logger = logging.getLogger(__name__)

LEASE_SECONDS: Final = 15.0
"""A candidate takes a Lease that nobody has renewed for this long."""
RENEW_DEADLINE_SECONDS: Final = 10.0
"""A leader that has not renewed for this long ends: five seconds before anybody else may begin."""
RETRY_SECONDS: Final = 2.0
CALL_SECONDS: Final = 3.0
LOST_EXIT_CODE: Final = 1


class TimedLeaseLock(LeaseLock):  # type: ignore[misc]
    """The Lease. A call that fails, in whatever way, answers False; none takes longer than three seconds."""

    def __init__(self, name: str, namespace: str, identity: str, client: Any, clock: Callable[[], float]) -> None:
        """Use the Lease ``namespace/name``, which the chart creates, in the name of ``identity``."""
        super().__init__(name, namespace, identity, client)
        self._clock = clock
        self._seen: tuple[str | None, str | None] | None = None
        self._seen_at = 0.0
        self.trouble = ""
        """Why the last call failed; empty where it did not."""

    @property
    def holder(self) -> str | None:
        """Who held it when it was last read."""
        return self._seen[0] if self._seen else None

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        """Read it, and note when somebody last renewed it as this process's clock counts."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                found, answer = await super().get(name, namespace)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found, answer = False, ApiException(status=0, reason=str(error) or type(error).__name__)
        self.trouble = "" if found else f"it can't be read: {answer.status} {answer.reason}"
        if found:
            seen = (answer.holder_identity, answer.renew_time)
            if seen != self._seen:
                self._seen, self._seen_at = seen, self._clock()
        return found, answer

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        """Refuse: the chart creates the Lease, so that the operator needs no permission to create any."""
        self.trouble = f"Lease {namespace}/{name} must exist; the chart creates it"
        return False

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        """Take or renew it; the server refuses where somebody else was faster."""
        others = self.holder not in (None, "", self.identity)
        if others and self._clock() - self._seen_at < LEASE_SECONDS:
            return False  # the library judged by the wall clock, which somebody has set forward
        try:
            async with asyncio.timeout(CALL_SECONDS):
                updated = bool(await super().update(name, namespace, updated_record))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.trouble = f"it can't be written: {str(error) or type(error).__name__}"
            return False
        self.trouble = "" if updated else "the API server refused the update"
        return updated

    async def give_back(self) -> None:
        """Clear the holder, so that another candidate need not wait; raises what the library raises."""
        async with asyncio.timeout(CALL_SECONDS):
            lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
            if lease.spec is None or lease.spec.holder_identity != self.identity:
                return
            lease.spec.holder_identity = None
            await self.api_instance.replace_namespaced_lease(name=self.name, namespace=self.namespace, body=lease)


def end_process(code: int) -> None:
    """End at once: no clean-up of a former leader may write anything any more."""
    logging.shutdown()
    os._exit(code)


class LeaderElector:
    """Gets, keeps and gives back the Lease."""

    def __init__(
        self,
        lease: TimedLeaseLock,
        *,
        end: Callable[[int], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet. ``end`` is called with an exit code when the Lease is lost and must not return."""
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
                # The library would run this beside its own renewal and not notice how it ends.
                onstarted_leading=_nothing,
                onstopped_leading=_nothing,
            )
        )

    @property
    def leads(self) -> bool:
        """Whether this process got the Lease and did not give it back."""
        return self._renewed_at is not None

    def age(self) -> float:
        """Return the seconds since the Lease was renewed; 0 without it."""
        return self._clock() - self._renewed_at if self._renewed_at is not None else 0.0

    async def acquire(self, seen: Callable[[], None]) -> None:
        """Wait for the Lease, for ever; ``seen`` is called whenever it could be read."""
        told = ""
        while not await self._try():
            news = self._lease.trouble or f"{self._lease.holder} holds it"
            if not self._lease.trouble:
                seen()
            if news != told:
                logger.info("waiting for the Lease %s: %s", self._lease.name, news)
                told = news
            await asyncio.sleep(RETRY_SECONDS)
        seen()
        logger.info("%s leads: it got the Lease %s", self._lease.identity, self._lease.name)

    async def keep(self) -> None:
        """Renew the Lease, for ever; the process ends where that fails for too long."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            self.check()
            try:
                # Whatever the calls wait for: at the deadline the process ends.
                async with asyncio.timeout(RENEW_DEADLINE_SECONDS - self.age()):
                    renewed = await self._try()
            except TimeoutError:
                renewed = False
            if not renewed and self._lease.holder not in (None, "", self._lease.identity):
                self._lost(f"{self._lease.holder} holds it")
            self.check()

    def check(self) -> None:
        """End the process where the Lease was not renewed in time. Called before every write."""
        if self.leads and self.age() < RENEW_DEADLINE_SECONDS:
            return
        self._lost(f"not renewed for {self.age():.0f} s ({self._lease.trouble or 'the process stood still'})")

    async def release(self) -> None:
        """Give the Lease back once nothing writes any more."""
        if not self.leads:
            return
        self._renewed_at = None
        try:
            await self._lease.give_back()
        except (ApiException, aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.warning("the Lease was not given back, the next leader waits for its end: %s", error)
        else:
            logger.info("the Lease %s was given back", self._lease.name)

    async def _try(self) -> bool:
        # Counted from before the calls: the server's clock for the Lease starts after that.
        asked = self._clock()
        if not await self._election.try_acquire_or_renew():
            return False
        self._renewed_at = asked
        return True

    def _lost(self, why: str) -> None:
        logger.error("the Lease %s is lost, the process ends: %s", self._lease.name, why)
        self._end(LOST_EXIT_CODE)


async def _nothing() -> None:
    """Do nothing: what a leader does is started by `application`."""
