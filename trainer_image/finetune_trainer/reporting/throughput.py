"""Tokens per second and remaining time of a run, over a sliding window of steps. `progress.py` reports both."""

from __future__ import annotations

import collections
from typing import NamedTuple

RATE_WINDOW = 50
"""Number of newest steps over which tokens per second and remaining time are computed."""


class Tokens(NamedTuple):
    """Numbers of tokens of one step, over all ranks."""

    supervised: int
    """Tokens whose loss is trained on."""
    real: int
    """Tokens of prompts and answers, without padding."""
    padded: int
    """All computed positions, padding included."""


class TokenRates(NamedTuple):
    """Tokens per second of each kind, None before the first step."""

    supervised: float | None
    real: float | None
    padded: float | None


class Throughput:
    """Tokens per second and remaining time over the last RATE_WINDOW steps. Time counts from the begin of the first
    step on, because the base model may be scored for minutes before. From then on all time counts, also that for
    evaluating and saving."""

    def __init__(self) -> None:
        self._ticks: collections.deque[tuple[float, Tokens]] = collections.deque(maxlen=RATE_WINDOW + 1)

    def step(self, now: float, tokens: Tokens, seconds: float) -> None:
        """Note a step of ``seconds`` that finished at ``now``, in monotonic seconds."""
        if not self._ticks:
            self._ticks.append((now - seconds, Tokens(0, 0, 0)))
        self._ticks.append((now, tokens))

    def _elapsed(self) -> float:
        return self._ticks[-1][0] - self._ticks[0][0] if self._ticks else 0.0

    def per_second(self) -> TokenRates:
        """Return the tokens per second of each kind over the window."""
        elapsed = self._elapsed()
        if elapsed <= 0:
            return TokenRates(None, None, None)
        steps = [tokens for _, tokens in list(self._ticks)[1:]]
        return TokenRates(*(sum(kind) / elapsed for kind in zip(*steps, strict=True)))

    def eta_seconds(self, steps_left: int) -> int | None:
        """Return the seconds that ``steps_left`` more steps will take, None before the first step."""
        steps = len(self._ticks) - 1
        return round(self._elapsed() / steps * steps_left) if steps > 0 else None
