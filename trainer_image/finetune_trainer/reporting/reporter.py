"""Rank 0's reports to the operator: a thread posts the newest one every few seconds; losing them harms nothing.

The training thread only replaces the report; it never waits for the network but for the last one.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import requests

from finetune_core.contract import CurvePoint, Report, ReportConfig
from finetune_trainer.pod.settings import Paths

log = logging.getLogger(__name__)

MOST_POINTS = 60
REQUEST_SECONDS = 5.0
FINAL_TRIES = 3
RATE_WINDOW = 50
"""Steps over which speed and remaining time are taken."""


def thin(points: Sequence[CurvePoint], limit: int = MOST_POINTS) -> list[CurvePoint]:
    """Return at most ``limit`` points: first, last, the newest evaluations, and an even choice of the others.

    Evaluations are rare and worth more; they get at most half of the room.
    """
    if len(points) <= limit:
        return list(points)
    scored = [index for index, point in enumerate(points) if point.perplexity is not None]
    chosen = {0, len(points) - 1, *_even(scored, limit // 2)}
    rest = [index for index in range(len(points)) if index not in chosen]
    chosen |= set(_even(rest, limit - len(chosen)))
    return [points[index] for index in sorted(chosen)]


def _even(items: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of ``items`` in even distances with the last one among them, all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(index + 1) * len(items) // count - 1] for index in range(count)]


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


class Reporter:
    """Posts the newest report from a thread of its own."""

    def __init__(self, config: ReportConfig, paths: Paths, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; nothing is sent before `start`."""
        self._config = config
        self._ca_file = paths.ca_file
        self._token_file = paths.report_token_file
        self._clock = clock
        self._session = requests.Session()
        # Proxies and .netrc of the environment are not meant for the operator's Service.
        self._session.trust_env = False
        self._newest: Report | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Begin to post."""
        self._thread.start()

    def update(self, report: Report, *, urgent: bool = False) -> None:
        """Replace the report that is posted next; ``urgent`` posts it now and not at the next interval."""
        with self._changed:
            self._newest = report
            if urgent:
                self._changed.notify()

    def close(self, final: Report) -> None:
        """Stop the thread and post the final report; a few tries, then it is left to the termination message."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2 * REQUEST_SECONDS)
        for _ in range(FINAL_TRIES):
            if self._post(final):
                return

    def _run(self) -> None:
        due = self._clock()
        while True:
            with self._changed:
                self._changed.wait(max(0.0, due - self._clock()))
                if self._closed:
                    return
                report, self._newest = self._newest, None
            if report is not None:
                self._post(report)
            due = self._clock() + self._config.interval_seconds

    def _post(self, report: Report) -> bool:
        try:
            response = self._session.post(
                self._config.url,
                data=report.to_json().encode(),
                headers={
                    "Authorization": f"Bearer {self._token_file.read_text().strip()}",
                    "Content-Type": "application/json",
                },
                verify=str(self._ca_file),
                timeout=REQUEST_SECONDS,
            )
            response.raise_for_status()
        except (requests.RequestException, OSError) as error:
            if not self._failing:
                log.warning("reports to the operator fail, training goes on: %s", error)
            self._failing = True
            return False
        if self._failing:
            log.info("reports to the operator work again")
        self._failing = False
        return True
