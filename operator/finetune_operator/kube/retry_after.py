"""Makes all requests of a client wait while the API server asks for less load.

The API server asks for less load by an answer with 429, or by an answer with 503 and `Retry-After`. An overloaded API
server gives such an answer to some requests only. If no other request waited, the reconciles of thousands of jobs would
go on sending requests. `client.py` owns one `LoadLimit`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

logger = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = 1.0
"""Pause in seconds after a 429 without a readable `Retry-After`, and after a 503 whose `Retry-After` is unreadable."""
MOST_SECONDS: Final = 300.0
"""Longest pause that is obeyed, so that a proxy with a wrong answer does not stop the operator for hours."""


LONGEST_TEXT: Final = 64
"""Largest number of characters of a `Retry-After` that is read. A date has 29 characters."""


def pause_seconds(status: int, headers: Mapping[str, str], now: datetime) -> float | None:
    """Return for how many seconds an answer asks the client to send nothing; None where the answer does not ask.

    The answer has the HTTP status ``status`` and the header fields ``headers``, and arrived at ``now``. Every 429 asks
    for a pause; a 503 asks for a pause if it has a `Retry-After`. The value of `Retry-After` is a number of seconds, or
    a date as RFC 9110 allows.
    """
    value = headers.get("Retry-After")
    if status != HTTPStatus.TOO_MANY_REQUESTS and (status != HTTPStatus.SERVICE_UNAVAILABLE or value is None):
        return None
    return min(MOST_SECONDS, max(0.0, _seconds(value or "", now)))


def _seconds(value: str, now: datetime) -> float:
    if len(value) > LONGEST_TEXT:
        return DEFAULT_SECONDS
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return DEFAULT_SECONDS
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds()


class LoadLimit:
    """Lets requests through, except during the pauses for which answers of the API server have asked."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Let everything through at first. ``clock`` returns monotonic seconds; ``sleep`` waits for some seconds."""
        self._clock = clock
        self._sleep = sleep
        self._until = 0.0

    async def wait(self) -> None:
        """Return once no pause lasts any more. A pause that begins while this call waits prolongs the wait."""
        while (left := self._until - self._clock()) > 0:
            await self._sleep(left)

    def pause(self, seconds: float) -> None:
        """Let nothing through for ``seconds`` from now on. A pause that lasts longer already is kept."""
        until = self._clock() + seconds
        if until > self._until:
            logger.warning("the API server asks for less load: no request is sent for %.0f s", seconds)
            self._until = until
