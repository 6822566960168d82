"""The work queue of jobs to reconcile, after the model of client-go's workqueue.

The queue holds keys (namespace and name) and no objects. `watches.py`, `controller.py`, `reports/server.py` and
`preflight_slots.py` add keys; the workers in `controller.py` take keys out.

Keys are taken in a fair order (`fair_order.py`): the namespaces take turns, and keys with news, such as a watch event,
come before keys that only the resync has listed.

A key that already waits is not queued twice. A key that a worker is processing is not given to a second worker. If the
key is added meanwhile, it is queued again when the first worker calls `done`. After failures a key waits for a back-off
that grows exponentially and has jitter.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import time
from collections.abc import Callable

from finetune_operator.queue.fair_order import FairOrder, Precedence
from finetune_operator.queue.key import Key

BASE_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 300.0


def backoff_seconds(failures: int, *, jitter: float, base: float = BASE_DELAY_SECONDS) -> float:
    """Return the delay in seconds before the next try, after ``failures`` (1 or more) consecutive failures.

    The delay is ``base`` after the first failure, doubles with each further failure, and is at most 300 s. ``jitter``
    (0 to 1) shortens the delay by up to a quarter, so that keys which failed together are not retried together.
    """
    # The exponent is bounded, because 2.0 ** n overflows for a key that has failed for weeks.
    delay = min(MAX_DELAY_SECONDS, base * 2.0 ** min(failures - 1, 40))
    return delay * (1 - jitter / 4)


class WorkQueue:
    """Queue of job keys with deduplication, delayed keys and a back-off per key.

    The queue is not thread-safe: all callers run in one event loop.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        """Create an empty queue. ``clock`` returns monotonic seconds, and ``jitter`` a random number from 0 to 1."""
        self._clock = clock
        self._jitter = jitter
        self._ready = FairOrder()
        self._dirty: dict[Key, Precedence] = {}
        """Keys that are due and wait for a worker, and why each waits. A key that a worker processes is among them only
        where it was added again meanwhile."""
        self._processing: set[Key] = set()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of keys that are due and wait for a worker; delayed keys are not counted."""
        return len(self._dirty)

    def oldest_age(self) -> float:
        """Return for how many seconds the oldest key in the queue has been waiting for a worker; 0.0 if none waits."""
        oldest = self._ready.oldest()
        return 0.0 if oldest is None else self._clock() - oldest

    def add(self, key: Key) -> None:
        """Queue ``key`` now. A key that already waits is not queued a second time."""
        self._add(key, Precedence.NEWS)

    def add_again(self, key: Key) -> None:
        """Queue ``key`` now, before the other keys of its namespace, because its job is in the middle of a change."""
        self._add(key, Precedence.AGAIN)

    def add_for_resync(self, key: Key) -> None:
        """Queue ``key`` behind the keys with news (see `fair_order.py`), because nothing new is known of its job."""
        self._add(key, Precedence.RESYNC)

    def _add(self, key: Key, precedence: Precedence) -> None:
        self._dirty[key] = min(precedence, self._dirty.get(key, precedence))
        if key not in self._processing:
            self._make_ready(key)

    def _make_ready(self, key: Key) -> None:
        self._ready.add(key, self._clock(), self._dirty[key])
        self._changed.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Queue ``key`` in ``seconds``. If ``key`` already has an earlier due time, the earlier time is kept."""
        due = self._clock() + max(0.0, seconds)
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        self._changed.set()

    def add_rate_limited(self, key: Key) -> float:
        """Count a failure of ``key``, queue ``key`` after its back-off, and return that back-off in seconds."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay = backoff_seconds(self._failures[key], jitter=self._jitter())
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """Reset the failure count of ``key`` after a reconcile that succeeded."""
        self._failures.pop(key, None)

    def discard(self, key: Key) -> None:
        """Drop the delay and the failure count of ``key``, because its job no longer exists."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    def pop(self) -> Key | None:
        """Remove the next due key from the queue and return the key; return None where no key is due.

        The caller must call `done` after processing the key.
        """
        self._promote()
        key = self._ready.take(self._clock())
        if key is None:
            return None
        del self._dirty[key]
        self._processing.add(key)
        return key

    async def get(self) -> Key:
        """Wait until a key is due, take it out of the queue and return it.

        The caller must call `done` after processing the key.
        """
        while (key := self.pop()) is None:
            self._changed.clear()
            # The time-out is suppressed because it only marks the moment at which a delayed key becomes due.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_next()):
                    await self._changed.wait()
        return key

    def done(self, key: Key) -> None:
        """Mark ``key`` as processed. A key that was added during the processing is queued again at once."""
        self._processing.discard(key)
        if key in self._dirty:
            self._make_ready(key)

    def _promote(self) -> None:
        """Queue every delayed key whose due time has come."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            # Obsolete heap entries are skipped. An entry is obsolete after `discard`, and after an `add_after` with an
            # earlier due time: `_due` no longer holds the time of the entry.
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)

    def _seconds_to_next(self) -> float | None:
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
