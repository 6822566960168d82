"""Throughput."""

from __future__ import annotations

import collections
from typing import NamedTuple

RATE_WINDOW = 50
"""Steps over which speed and remaining time are taken."""


class Tokens(NamedTuple):
    """Tokens of a step."""

    supervised: int
    """Those that the loss is taken on."""
    real: int
    """Prompts and answers."""
    padded: int
    """All positions that were computed."""


class TokenRates(NamedTuple):
    """Tokens per second, None before the first step."""

    supervised: float | None
    real: float | None
    padded: float | None


class Speed:
    """Tokens per second and remaining time from a sliding window of steps; all time counts, also that of saving."""

    def __init__(self, now: float) -> None:
        """Start at monotonic time ``now``."""
        begun = (now, Tokens(0, 0, 0))
        self._ticks: collections.deque[tuple[float, Tokens]] = collections.deque([begun], maxlen=RATE_WINDOW + 1)

    def step(self, now: float, tokens: Tokens) -> None:
        """Note a finished step."""
        self._ticks.append((now, tokens))

    def _elapsed(self) -> float:
        return self._ticks[-1][0] - self._ticks[0][0]

    def per_second(self) -> TokenRates:
        """Return the tokens per second over the window, of each kind."""
        elapsed = self._elapsed()
        if elapsed <= 0:
            return TokenRates(None, None, None)
        steps = [tokens for _, tokens in list(self._ticks)[1:]]
        return TokenRates(*(sum(kind) / elapsed for kind in zip(*steps, strict=True)))

    def eta_seconds(self, steps_left: int) -> int | None:
        """Return the seconds that ``steps_left`` steps will take at this speed, None before the first step."""
        steps = len(self._ticks) - 1
        return round(self._elapsed() / steps * steps_left) if steps else None
