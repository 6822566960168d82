"""A token bucket, which limits how often something may happen: at a steady rate, after a burst.

Status writes have a token bucket for all jobs together (`status/writer.py`). Each job has a bucket for the status
writes that the reports of its pods cause, and a bucket for the annotations of its pods (`memory.py`). HTTP clients have
buckets too (`process/rate_limit.py`).
"""

from __future__ import annotations


class TokenBucket:
    """A bucket that starts full. Every action takes a token, and a later action can reserve its token in advance.

    Every method takes the current time ``now``, in seconds of a monotonic clock.
    """

    def __init__(self, *, per_second: float, burst: float) -> None:
        """Create a full bucket, which holds ``burst`` tokens at most and gains ``per_second`` tokens per second."""
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._filled_at: float | None = None

    def reserve(self, now: float) -> float:
        """Take a token, which the bucket may not hold yet, and return the time from which on the action may happen.

        The caller keeps the returned time, so that a job that has to wait does not take another token at each
        reconcile.
        """
        self._fill(now)
        self._tokens -= 1
        return now + max(0.0, -self._tokens) / self._per_second

    def take(self, now: float) -> bool:
        """Take a token if the bucket holds one, and return whether it did."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def spend(self, now: float) -> None:
        """Take a token for an action that does not wait, unless the bucket owes ``burst`` tokens already.

        Without that bound, many such actions would make the actions that do wait for a token wait too long.
        """
        self._fill(now)
        if self._tokens > -self._burst:
            self._tokens -= 1

    def _fill(self, now: float) -> None:
        before = now if self._filled_at is None else self._filled_at
        self._tokens = min(self._burst, self._tokens + max(0.0, now - before) * self._per_second)
        self._filled_at = max(before, now)
