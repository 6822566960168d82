"""Ends a rank whose training thread waits in a call that never returns, such as a synchronisation with a GPU whose
kernel waits for a rank that is gone.

On the CPU a lost rank breaks the connections of gloo, and the waiting call raises an error at once. On GPUs the call
waits in a kernel of NCCL, which no signal and no exception can reach. So another thread, which has learned that the
ranks leave, demands that the training thread comes back within a bound, and the guard ends the process where it does
not. The watchdog (`watchdog.py`) has the same means but another question: whether there is progress at all, within the
much longer `stability.stallTimeoutSeconds`.

Nothing in the product calls this module yet.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

LEAST_SECONDS = 10.0
"""Least time in seconds that the training thread has to come back. With the 5 s for which the watchdog then informs the
other ranks, a rank leaves within 15 s."""
MOST_SECONDS = 45.0
"""Longest time in seconds that the training thread has to come back, however long its calls took so far. Half of the
pod's termination grace period of 90 s is left for a checkpoint."""
PAUSES = 3.0
"""After a SIGTERM a call may take this many times as long as the longest one so far."""


def return_seconds(longest_pause: float) -> float:
    """Return how many seconds the training thread has to come back after a SIGTERM. ``longest_pause`` is the longest
    time in seconds that passed between two returns so far, for example the time of a micro-batch."""
    return min(max(LEAST_SECONDS, PAUSES * longest_pause), MOST_SECONDS)


class EndsProcess(Protocol):
    """What the guard needs of `Watchdog`."""

    def end_process(self, message: str, *, caused_by_peer: bool) -> None:
        """Write stack traces and the outcome, and end the process. `Watchdog.end_process` never returns."""


@dataclass(frozen=True)
class _Demand:
    reason: str
    seconds: float
    deadline: float
    caused_by_peer: bool


class ReturnGuard:
    """Watches that the training thread comes back when it has to. One rank has one guard."""

    def __init__(self, watchdog: EndsProcess, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the thread of the guard. ``watchdog`` ends the process."""
        self._watchdog = watchdog
        self._clock = clock
        self._changed = threading.Condition()
        self._demand: _Demand | None = None
        self._ending = False
        self._passed_at = clock()
        self._longest_pause = 0.0
        threading.Thread(target=self._watch, name="return guard", daemon=True).start()

    @property
    def longest_pause(self) -> float:
        """The longest time in seconds between two calls of `passed` so far."""
        return self._longest_pause

    def passed(self) -> None:
        """Note that the training thread is back from its calls, which meets a demand. The training thread calls this at
        every collective. The call does not return where the guard has begun to end the process."""
        with self._changed:
            now = self._clock()
            self._longest_pause = max(self._longest_pause, now - self._passed_at)
            self._passed_at = now
            self._demand = None
            self._changed.notify_all()
            ending = self._ending
        if ending:
            threading.Event().wait()

    def demand(self, reason: str, *, caused_by_peer: bool, seconds: float = LEAST_SECONDS) -> None:
        """Demand that the training thread calls `passed` within ``seconds``. Where an earlier demand ends sooner, the
        earlier demand stands. Any thread may call this.

        ``reason`` begins the message of the outcome: `rank 0 is gone`. With ``caused_by_peer`` the outcome is only a
        consequence of the end of another rank.
        """
        with self._changed:
            deadline = self._clock() + seconds
            if self._demand is None or deadline < self._demand.deadline:
                self._demand = _Demand(reason, seconds, deadline, caused_by_peer)
                self._changed.notify_all()

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Demand that the block, in which the training thread does ``what``, ends within ``seconds``. The training
        thread uses this for what it does with the GPU after the ranks have agreed to stop."""
        self.demand(f"{what} takes too long", caused_by_peer=False, seconds=seconds)
        try:
            yield
        finally:
            self.passed()

    def check(self) -> float | None:
        """End the process where a demand is overdue. Otherwise return how many seconds a demand is from its deadline,
        None where there is no demand. The thread of the guard calls this."""
        with self._changed:
            demand = self._demand
            if demand is None:
                return None
            left = demand.deadline - self._clock()
            if left > 0:
                return left
            self._ending, self._demand = True, None
        self._watchdog.end_process(
            f"{demand.reason}, and the training thread did not return from its call within {demand.seconds:.0f} s",
            caused_by_peer=demand.caused_by_peer,
        )
        return None

    def _watch(self) -> None:
        while True:
            left = self.check()
            with self._changed:
                # A demand that was made between the check and this line has notified nobody, so it is looked at here.
                if left is None and self._demand is not None:
                    continue
                self._changed.wait(left)
