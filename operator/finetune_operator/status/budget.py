"""How often statuses may be written for new numbers only, over all jobs: a bucket of tokens that fills steadily.

Ten seconds between two writes of a job still are 500 writes a second with 5,000 jobs. What changes a condition or an
attempt is written at once, whatever the bucket holds, and takes a token too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

WRITES_PER_SECOND: Final = 20.0
BURST: Final = 100.0


class WriteBudget:
    """Tokens for writes."""

    def __init__(
        self, clock: Callable[[], float], *, per_second: float = WRITES_PER_SECOND, burst: float = BURST
    ) -> None:
        """Start full."""
        self._clock = clock
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at = clock()

    def reserve(self) -> float:
        """Take the next place for a write of new numbers; return the time on the clock at which it comes.

        Places, not refusals: a job that waits looks once more, when its place comes, and not again and again.
        """
        self._fill()
        self._tokens -= 1
        return self._filled_at + max(0.0, -self._tokens) / self._per_second

    def spend(self) -> None:
        """Count a write that waits for nothing: those of numbers then wait longer, but not for ever."""
        self._fill()
        if self._tokens > -self._burst:
            self._tokens -= 1

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
