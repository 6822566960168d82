"""How many preflight checks may run at the same time over all jobs, and which job is the next to get its turn.

`act/preflight_turns.py` asks for a slot before a preflight pod is created. A restart of the operator loses the slots.
The preflight pods that exist are then counted again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from finetune_operator.queue.key import Key

DEFAULT_LIMIT = 20
"""Largest number of preflight checks that run at the same time, where no setting says otherwise."""
START_SECONDS = 60.0
"""Seconds for which a job keeps a new slot although no reconcile has seen a preflight pod of the job."""
RUN_SECONDS = 300.0
"""Seconds for which a job keeps its slot after the last reconcile that saw its preflight pod. Jobs with such a pod are
reconciled at least every 10 s."""


class PreflightSlots:
    """The slots of all jobs. A job has one slot at most. Not thread-safe: all callers run in one event loop."""

    def __init__(
        self,
        limit: int = DEFAULT_LIMIT,
        *,
        wake: Callable[[Key], None] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Have ``limit`` slots. ``clock`` returns monotonic seconds.

        When a slot becomes free, a waiting job gets the slot, and ``wake`` is called with the key of that job.
        """
        self.limit = limit
        self._wake = wake
        self._clock = clock
        self._held: dict[Key, float] = {}
        """The time until which each job holds its slot, unless a later reconcile sees its pod again."""
        self._waiting: dict[Key, None] = {}
        """Jobs that wait for a slot; the job that has waited longest comes first."""

    def occupy(self, key: Key) -> None:
        """Keep the slot of the job ``key``, whose preflight pod was seen. A job without a slot gets a slot, even where
        all slots are taken."""
        self._waiting.pop(key, None)
        self._held[key] = self._clock() + RUN_SECONDS

    def acquire(self, key: Key) -> bool:
        """Return whether the job ``key`` has a slot, and so may create its preflight pod now.

        A job without a slot gets a free slot if its turn has come. Otherwise the job waits, and is woken when its turn
        comes.
        """
        self._drop_expired()
        if key not in self._held:
            self._waiting.setdefault(key)
            self._give_out(asking=key)
        return key in self._held

    def release(self, key: Key) -> None:
        """Take back the slot of the job ``key``, or its place in the line, because no preflight pod of the job uses a
        slot or is about to be created."""
        self._waiting.pop(key, None)
        if self._held.pop(key, None) is not None:
            self._drop_expired()
            self._give_out()

    def _give_out(self, asking: Key | None = None) -> None:
        """Give free slots to waiting jobs, and wake each of them but the job that is ``asking``."""
        while self._waiting and len(self._held) < self.limit:
            key = self._next()
            del self._waiting[key]
            self._held[key] = self._clock() + START_SECONDS
            if key != asking:
                self._wake(key)

    def _next(self) -> Key:
        """Return the waiting job whose namespace holds the fewest slots; of several, the job that has waited longest.

        So a namespace with many jobs does not keep the jobs of other namespaces waiting.
        """
        held = Counter(key.namespace for key in self._held)
        return min(self._waiting, key=lambda key: held[key.namespace])

    def _drop_expired(self) -> None:
        now = self._clock()
        for key in [key for key, until in self._held.items() if until <= now]:
            del self._held[key]
