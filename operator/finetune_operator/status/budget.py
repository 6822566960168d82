"""A token bucket that limits the status writes per second over all jobs, so that the API server is not flooded.

Only writes of new numbers (step, loss, speed) wait for the bucket: with ten seconds between two writes of a job, 5,000
jobs would still cause 500 writes per second. A change of a condition or of an attempt is written at once, even with an
empty bucket, and takes a token as well. `writer.py` owns the bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

WRITES_PER_SECOND: Final = 20.0
"""Tokens that the bucket gains per second."""
BURST: Final = 100.0
"""Most tokens that the bucket holds."""


class WriteBudget:
    """A token bucket for status writes. Each write takes a token, and a job can reserve a later write in advance."""

    def __init__(
        self, clock: Callable[[], float], *, per_second: float = WRITES_PER_SECOND, burst: float = BURST
    ) -> None:
        """Create a full bucket, which holds ``burst`` tokens at most and gains ``per_second`` tokens per second.

        ``clock`` returns monotonic seconds.
        """
        self._clock = clock
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = clock()

    def reserve(self) -> float:
        """Take a token for a status write that brings only new numbers (step, loss, speed), and return the time of
        ``clock`` from which this write may happen.

        The caller keeps that time, so a job that has to wait does not take another token at each reconcile.
        """
        self._fill()
        self._tokens -= 1
        return self._filled_at + max(0.0, -self._tokens) / self._per_second

    def spend(self) -> None:
        """Take a token for a write that does not wait, unless the bucket owes ``burst`` tokens already.

        Without that bound, many such writes would delay the writes of new numbers too long.
        """
        self._fill()
        if self._tokens > -self._burst:
            self._tokens -= 1

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
