"""Ends a process that makes no progress: stack traces of all threads into the log, the outcome on disk, exit code 75.

One thread per rank; the training thread pats it wherever the ranks meet. What may take long for good reasons (loading,
the object store) has its own allowance. The file that it touches tells the launcher that the process is not frozen.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_core.contract import Outcome, Result
from finetune_trainer.pod.outcomes import Standing, WorkerOutcome, write_heartbeat, write_outcome

LOOK_SECONDS = 1.0
ANNOUNCE_SECONDS = 5.0
"""How long a stalled rank tries to tell the others before it leaves."""


class Watchdog:
    """Watches the training thread of this process."""

    def __init__(
        self, folder: Path, rank: int, limit_seconds: float, standing: Standing, *, look_seconds: float = LOOK_SECONDS
    ) -> None:
        """Watch from now on; ``limit_seconds`` is the longest time between two pats."""
        self._folder = folder
        self._rank = rank
        self._limit = limit_seconds
        self._standing = standing
        self._look = min(look_seconds, limit_seconds / 4)
        self._allowance = 0.0
        self._seen = time.monotonic()
        self._leaving = threading.Lock()
        self.announce: Callable[[str], None] = lambda _: None
        """Tells the other ranks why this one stalls; set once they are known."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pat(self) -> None:
        """Note progress."""
        self._seen = time.monotonic()

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Let the block take ``seconds`` longer than a step may: it has a bound of its own."""
        self.pat()
        before, self._allowance = self._allowance, max(self._allowance, seconds)
        try:
            yield
        finally:
            self.pat()
            self._allowance = before

    def claim_end(self) -> None:
        """Make sure that one thread alone says how the process ends: the first that asks goes on, for any other this
        never returns."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()

    def leave(self, message: str, *, caused_by_peer: bool) -> None:
        """Write stack traces and outcome and end the process; never returns."""
        self.claim_end()
        print(f"{message}; the stacks of all threads of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        result = Result(
            outcome=Outcome.OUTSIDE_FAILURE,
            message=message,
            step=self._standing.step,
            checkpoint=self._standing.checkpoint,
        )
        write_outcome(self._folder, self._rank, WorkerOutcome(result=result, caused_by_peer=caused_by_peer))
        if not caused_by_peer:
            telling = threading.Thread(target=self.announce, args=(message,), daemon=True)
            telling.start()
            telling.join(ANNOUNCE_SECONDS)
        os._exit(result.exit_code)

    def _watch(self) -> None:
        while True:
            write_heartbeat(self._folder, self._rank, self._standing)
            silent = time.monotonic() - self._seen
            if silent > self._limit + self._allowance:
                self.leave(
                    f"no progress for {silent:.0f} s in phase {self._standing.phase}, after step"
                    f" {self._standing.step} (stability.stallTimeoutSeconds is {self._limit:.0f}): rank {self._rank}"
                    " hangs, or waits for one that does",
                    caused_by_peer=False,
                )
            # The interval of the watch; nothing waits for it.
            time.sleep(self._look)
