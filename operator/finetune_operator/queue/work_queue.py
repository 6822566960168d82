"""The queue of jobs to reconcile: keys only, no event bodies. Watches, timers, reports and the resync put keys in,
the workers take them out.

As client-go's work queue: a key that waits is not queued twice (`_dirty`), a key in work is not given to a second
worker (`_busy`) but comes again afterwards if it was added meanwhile; delayed keys lie in a heap; failures of a
key back off exponentially with jitter.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

BASE_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 300.0


class Key(NamedTuple):
    """Namespace and name of a FineTuneJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        """Return `namespace/name`."""
        return f"{self.namespace}/{self.name}"


def backoff_seconds(failures: int, *, jitter: float, least: float = BASE_DELAY_SECONDS) -> float:
    """Return the delay after ``failures`` failures in a row (at least 1): doubled each time, at most 300 s.

    ``jitter`` from 0 to 1 takes away up to a quarter, so that keys which failed together come back apart.
    """
    # 2**40 is far beyond the cap: the exponent stays bounded for a key that has failed for weeks.
    delay = min(MAX_DELAY_SECONDS, least * 2.0 ** min(failures - 1, 40))
    return delay * (1 - jitter / 4)


class WorkQueue:
    """Queue of keys with deduplication, delays and per-key back-off; for one event loop."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        """Take ``clock`` (seconds) and ``jitter`` (0 to 1) from outside, so that tests are exact."""
        self._clock = clock
        self._jitter = jitter
        self._ready: deque[tuple[Key, float]] = deque()
        self._dirty: set[Key] = set()
        self._busy: set[Key] = set()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Return how many keys wait for a worker now; delayed ones do not count."""
        return len(self._dirty)

    @property
    def delayed(self) -> int:
        """Number of keys that wait for their time."""
        return len(self._due)

    def oldest_age(self) -> float:
        """Return for how many seconds the first key has been waiting for a worker."""
        return self._clock() - self._ready[0][1] if self._ready else 0.0

    def add(self, key: Key) -> None:
        """Queue ``key`` now, once, however often it is added."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._busy:
            self._ready.append((key, self._clock()))
            self._changed.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Queue ``key`` in ``seconds``; an earlier time that is already set stays."""
        due = self._clock() + max(0.0, seconds)
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        self._changed.set()

    def retry(self, key: Key, *, least: float = BASE_DELAY_SECONDS) -> float:
        """Queue ``key`` after its back-off and return the seconds; ``least`` is the first delay."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay = backoff_seconds(self._failures[key], jitter=self._jitter(), least=least)
        self.add_after(key, delay)
        return delay

    def forgive(self, key: Key) -> None:
        """Reset the back-off of ``key`` after a success."""
        self._failures.pop(key, None)

    def drop(self, key: Key) -> None:
        """Forget delays and failures of a job that no longer exists."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    def pop(self) -> Key | None:
        """Take the next key, or None where none is due; the taker calls `done` afterwards."""
        self._promote()
        if not self._ready:
            return None
        key, _ = self._ready.popleft()
        self._dirty.discard(key)
        self._busy.add(key)
        return key

    async def get(self) -> Key:
        """Wait for the next key; the taker calls `done` afterwards."""
        while (key := self.pop()) is None:
            self._changed.clear()
            # The time-out is the moment at which a delayed key is due: nothing has gone wrong then.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_next()):
                    await self._changed.wait()
        return key

    def done(self, key: Key) -> None:
        """Give ``key`` back after work; it comes again at once if it was added meanwhile."""
        self._busy.discard(key)
        if key in self._dirty:
            self._ready.append((key, self._clock()))
            self._changed.set()

    def _promote(self) -> None:
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            # An entry whose time was replaced by an earlier one, or whose key was dropped, is void.
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)

    def _seconds_to_next(self) -> float | None:
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
