"""Limits how many statuses are written per second for new numbers only, over all jobs, with a token bucket.

With ten seconds between two writes of a job, 5,000 jobs would still cause 500 writes per second. A change of a
condition or of an attempt is written at once, even with an empty bucket, and takes a token as well. `writer.py` owns
the bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

WRITES_PER_SECOND: Final = 20.0
"""Tokens that the bucket gains per second."""
BURST: Final = 100.0
"""Most tokens that the bucket holds."""


class WriteBudget:
    """A token bucket for status writes, in which jobs reserve a place."""

    def __init__(
        self, clock: Callable[[], float], *, per_second: float = WRITES_PER_SECOND, burst: float = BURST
    ) -> None:
        """Start with a full bucket; ``clock`` returns monotonic seconds."""
        self._clock = clock
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = clock()

    def reserve(self) -> float:
        """Reserve the next write of new numbers; return the time of the clock at which it may happen.

        A job that has to wait is reconciled once, at that time, instead of asking the bucket again and again.
        """
        self._fill()
        self._tokens -= 1
        return self._filled_at + max(0.0, -self._tokens) / self._per_second

    def spend(self) -> None:
        """Take a token for a write that does not wait. The debt is bounded, so that new numbers are written in time."""
        self._fill()
        if self._tokens > -self._burst:
            self._tokens -= 1

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
