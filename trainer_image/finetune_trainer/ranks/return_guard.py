"""Ends a rank whose training thread waits in a call that never returns, such as a synchronisation with a GPU whose
kernel waits for a rank that is gone.

On the CPU a lost rank breaks the connections of gloo, and the waiting call raises an error at once. On GPUs the call
waits in a kernel of NCCL, which no signal and no exception can reach. So another thread demands that the training
thread comes back within a bound, and the guard ends the process where it does not. The watchdog (`watchdog.py`) has the
same means but another question: whether there is progress at all, within the much longer
`stability.stallTimeoutSeconds`.

Three bounds exist. The guard looks at all that are in force, and the one that ends first counts.

- After a stop was requested, each call of the training thread has as much time as `allowed_seconds` says.
- After `demand`, each call has the seconds of the demand, also inside of a block.
- A block (`within`) has its seconds as a whole. The first bound does not hold inside of it.

Only `stand_down` ends the first two bounds, because a training thread that came back once may hang in its next call.

`worker.py` makes the guard, and `ranks/gang.py` tells the guard what the training thread does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from finetune_core.api.resources import Device

LEAST_SECONDS = 9.0
"""Least time in seconds that a call of the training thread has on GPUs. The thread of the guard may learn of a stop
half a second later, and the watchdog then informs the other ranks for at most 5 s. So a rank leaves within 15 s."""
MOST_SECONDS = 45.0
"""Longest time in seconds that a call of the training thread has, however long its calls took so far, and while work
runs that is done once, such as loading. Half of the pod's termination grace period of 90 s is left for a checkpoint."""
PAUSES = 3.0
"""After a stop was requested, a call may take this many times as long as the longest one so far."""
COPIED_BYTES_PER_SECOND = 2e9
"""The slowest copy between a GPU and the memory of its node that a bound allows for. A copy from memory that is not
pinned runs at 3 to 5 GB/s."""
POLL_SECONDS = 0.5
"""Interval in seconds at which the guard asks whether a stop was requested."""


def least_seconds(device: Device) -> float:
    """Return the least time in seconds that a call of the training thread has. On CPUs it is MOST_SECONDS, because a
    lost rank breaks the waiting call there, and a call may be slow because other processes have the cores."""
    return LEAST_SECONDS if device == "GPU" else MOST_SECONDS


def return_seconds(longest_pause: float, *, least: float = LEAST_SECONDS) -> float:
    """Return how many seconds a call of the training thread has after a stop was requested, ``least`` or more.
    ``longest_pause`` is the longest time in seconds that passed between two returns so far, for example the time of a
    micro-batch."""
    return min(max(least, PAUSES * longest_pause), MOST_SECONDS)


def copy_seconds(amount: int, *, least: float = LEAST_SECONDS) -> float:
    """Return how many seconds a copy of ``amount`` bytes between the GPU and the memory of the node may take after a
    stop was requested, ``least`` or more: the bound of a block (`ReturnGuard.within`)."""
    return min(least + amount / COPIED_BYTES_PER_SECOND, MOST_SECONDS)


class EndsProcess(Protocol):
    """What the guard needs of `Watchdog`."""

    def end_process(self, message: str, *, caused_by_peer: bool) -> None:
        """Write stack traces and the outcome, and end the process. `Watchdog.end_process` never returns."""


@dataclass(frozen=True)
class _Bound:
    """Until when the training thread has to come back, and what the guard says where it does not."""

    deadline: float
    seconds: float
    reason: str
    caused_by_peer: bool

    @property
    def message(self) -> str:
        return f"{self.reason}, and the training thread did not return from its call within {self.seconds:.0f} s"


class ReturnGuard:
    """Watches that the training thread comes back when it has to. One rank has one guard.

    The thread that makes the guard is the training thread. `passed`, `long_work`, `within` and `stand_down` are for it
    alone. A call of `passed` from another thread has no effect, so that a background thread can't hide that the
    training thread hangs.
    """

    def __init__(
        self,
        watchdog: EndsProcess,
        *,
        least: float = LEAST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread of the guard. ``watchdog`` ends the process. ``least`` is the least time in seconds that a
        call of the training thread has (see `least_seconds`)."""
        self.stop_requested: Callable[[], bool] = lambda: False
        """Returns whether this rank has to stop, because a rank received SIGTERM. The thread of the guard calls the
        function about twice a second. `Gang` sets the function once the ranks have joined."""
        self._watchdog = watchdog
        self._least = least
        self._clock = clock
        self._training_thread = threading.get_ident()
        self._changed = threading.Condition()
        self._stop_seen_at: float | None = None
        self._demands: list[_Bound] = []
        self._blocks: list[_Bound] = []
        self._ending = self._standing_down = False
        self._passed_at: float | None = None
        self._longest_pause: float | None = None
        self._depth_of_long_work = 0
        threading.Thread(target=self._watch, name="return guard", daemon=True).start()

    @property
    def longest_pause(self) -> float | None:
        """The longest time in seconds between two calls of `passed` before a stop was requested, without the time of
        `long_work` and of blocks. None where no pause was measured yet."""
        return self._longest_pause

    @property
    def allowed_seconds(self) -> float:
        """How many seconds a call of the training thread has after a stop was requested."""
        if self._depth_of_long_work or self._longest_pause is None:
            return MOST_SECONDS
        return return_seconds(self._longest_pause, least=self._least)

    @property
    def seconds_left(self) -> float | None:
        """How many seconds are left until the first bound ends. None where no bound is in force."""
        with self._changed:
            first = self._first_bound()
            return None if first is None else first.deadline - self._clock()

    # Functions of the training thread

    def passed(self) -> None:
        """Note that the training thread is back from its calls, so that all bounds but those of blocks begin anew. The
        training thread calls this at every collective, at every token that it generates, and at every part of a copy.
        The call does not return where the guard has begun to end the process."""
        if threading.get_ident() != self._training_thread:
            return
        with self._changed:
            self._pass(measured=True)
        self._stay_if_ending()

    @contextlib.contextmanager
    def long_work(self) -> Iterator[None]:
        """Inside the block the training thread does work that is done once, such as loading a model. A call then has
        MOST_SECONDS after a stop was requested, and the time of the block is no measure for later calls."""
        with self._changed:
            self._pass(measured=True)
            self._depth_of_long_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth_of_long_work -= 1
                self._pass(measured=False)
                # The bound of a call may end sooner from now on.
                self._changed.notify_all()
            self._stay_if_ending()

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Demand that the block, in which the training thread does ``what``, ends within ``seconds``, however often the
        training thread comes back in it. The training thread uses this for what it does with the GPU after the ranks
        have agreed to stop. A block inside of a block has to end within both bounds."""
        with self._changed:
            block = _Bound(self._clock() + seconds, seconds, f"{what} takes too long", caused_by_peer=False)
            self._blocks.append(block)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._blocks.pop()
                self._pass(measured=False)
                # A bound that did not hold in the block may end before the time for which the guard waits.
                self._changed.notify_all()
            self._stay_if_ending()

    def stand_down(self) -> None:
        """Let no bound hold from now on. The training thread calls this when the result of this rank is known. What is
        left to do, such as the last report, has time limits of its own. The call does not return where the guard has
        begun to end the process, so that the training thread writes no other outcome."""
        with self._changed:
            self._standing_down = True
        self._stay_if_ending()

    def _pass(self, *, measured: bool) -> None:
        now = self._clock()
        # A slow call after the stop must not give the next call more time.
        measured = measured and not (self._depth_of_long_work or self._blocks or self._stop_seen_at is not None)
        if measured and self._passed_at is not None:
            self._longest_pause = max(self._longest_pause or 0.0, now - self._passed_at)
        self._passed_at = now
        # All demands begin anew at this moment, so only the one with the shortest time can end first.
        self._demands = sorted(self._demands, key=lambda demand: demand.seconds)[:1]

    def _stay_if_ending(self) -> None:
        with self._changed:
            ending = self._ending
        if ending:
            threading.Event().wait()

    # Functions of other threads

    def demand(self, reason: str, *, caused_by_peer: bool, seconds: float | None = None) -> None:
        """Demand that the training thread calls `passed` within ``seconds``, and again within ``seconds`` each time.
        None stands for the least time of this guard. A demand that is made again changes nothing. Any thread may call
        this.

        ``reason`` begins the message of the outcome: `rank 0 is gone`. With ``caused_by_peer`` the outcome is only a
        consequence of the end of another rank.
        """
        seconds = self._least if seconds is None else seconds
        with self._changed:
            made = _Bound(self._clock() + seconds, seconds, reason, caused_by_peer)
            if any(_as_strict(other, made) for other in self._demands):
                return
            self._demands = [*(other for other in self._demands if not _as_strict(made, other)), made]
            self._changed.notify_all()

    def _first_bound(self) -> _Bound | None:
        """Return the bound that ends first, None where no bound is in force. The caller holds the lock."""
        if self._ending or self._standing_down:
            return None
        if self._stop_seen_at is None and self.stop_requested():
            self._stop_seen_at = self._clock()
        bounds = [*self._blocks, *(self._renewed(demand) for demand in self._demands)]
        if self._stop_seen_at is not None and not self._blocks:
            seconds = self.allowed_seconds
            stop = _Bound(self._stop_seen_at + seconds, seconds, "told to stop", caused_by_peer=False)
            bounds.append(self._renewed(stop))
        return min(bounds, key=lambda bound: bound.deadline, default=None)

    def _renewed(self, bound: _Bound) -> _Bound:
        """Return ``bound``, which begins anew each time when the training thread comes back, as it is at this
        moment."""
        if self._passed_at is None:
            return bound
        return replace(bound, deadline=max(bound.deadline, self._passed_at + bound.seconds))

    def _watch(self) -> None:
        while True:
            # One block of the lock for the look and for the wait, so that no change in between is missed.
            with self._changed:
                first = self._first_bound()
                left = POLL_SECONDS if first is None else first.deadline - self._clock()
                if first is None or left > 0:
                    self._changed.wait(min(left, POLL_SECONDS))
                    continue
                self._ending = True
            self._watchdog.end_process(first.message, caused_by_peer=first.caused_by_peer)
            return


def _as_strict(one: _Bound, other: _Bound) -> bool:
    """Return whether ``one`` ends no later than ``other``, now and after each return of the training thread."""
    return one.deadline <= other.deadline and one.seconds <= other.seconds
