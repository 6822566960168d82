"""Ends a process that makes no progress: writes the stack traces of all threads to the log and the outcome to disk,
then exits with code 75.

Each rank has one watchdog thread. `Gang` reports progress at every collective. Work that may take long, such as loading
or a call to the object store, gets a longer limit. The watchdog also writes a file about once a second, so that the
launcher can tell a live process from a frozen one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_core.contract import Outcome, Result
from finetune_trainer.pod.outcomes import WorkerOutcome, WorkerStatus, write_heartbeat, write_outcome

INTERVAL_SECONDS = 1.0
ANNOUNCE_SECONDS = 5.0
"""For at most this many seconds a stalled rank tries to tell the other ranks about the stall before it exits."""


class Watchdog:
    """Watches the training thread of this process from a thread of its own, and ends the process when the training
    thread stalls."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        limit_seconds: float,
        status: WorkerStatus,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        """Start to watch. ``limit_seconds`` is the longest time that may pass between two calls of `note_progress`,
        except where `allow` grants more."""
        self._folder = folder
        self._rank = rank
        self._limit = limit_seconds
        self._status = status
        self._interval = min(interval_seconds, limit_seconds / 4)
        self._allowance = 0.0
        self._progress_at = time.monotonic()
        self._end_lock = threading.Lock()
        self.announce: Callable[[str], None] = lambda _: None
        """Function that sends its argument, a message about the stall of this rank, to the other ranks. `Gang` sets the
        function once the ranks have joined."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def note_progress(self) -> None:
        """Note that the training thread makes progress at this moment."""
        self._progress_at = time.monotonic()

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Inside the block, allow ``seconds`` more than the stall limit without progress. The work in the block must
        have a time limit of its own."""
        self.note_progress()
        before, self._allowance = self._allowance, max(self._allowance, seconds)
        try:
            yield
        finally:
            self.note_progress()
            self._allowance = before

    def claim_end(self) -> None:
        """Let only one thread decide how the process ends. The first thread that calls this function continues; for any
        other thread the call never returns."""
        if not self._end_lock.acquire(blocking=False):
            threading.Event().wait()

    def end_process(self, message: str, *, caused_by_peer: bool) -> None:
        """Write stack traces and the outcome, then end the process. Never returns, also where the outcome can't be
        written, for example to a full disk.

        With ``caused_by_peer`` another rank stalls, and that rank has informed all ranks. Otherwise this function
        informs the other ranks.
        """
        self.claim_end()
        result = Result(
            outcome=Outcome.OUTSIDE_FAILURE,
            message=message,
            step=self._status.step,
            checkpoint=self._status.checkpoint,
        )
        try:
            # The log may lie on the disk that is full.
            with contextlib.suppress(OSError):
                print(f"{message}; the stacks of all threads of rank {self._rank}:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
            try:
                write_outcome(self._folder, self._rank, WorkerOutcome(result=result, caused_by_peer=caused_by_peer))
            except OSError:
                with contextlib.suppress(OSError):
                    traceback.print_exc()
            if not caused_by_peer:
                announcer = threading.Thread(target=self.announce, args=(message,), daemon=True)
                announcer.start()
                announcer.join(ANNOUNCE_SECONDS)
        finally:
            os._exit(result.exit_code)

    def _watch(self) -> None:
        is_told = False
        while True:
            try:
                write_heartbeat(self._folder, self._rank, self._status)
            except OSError as error:
                # The thread goes on, because it alone ends a process that stalls.
                if not is_told:
                    with contextlib.suppress(OSError):
                        print(f"the heartbeat of rank {self._rank} can't be written: {error}", file=sys.stderr)
                is_told = True
            silent = time.monotonic() - self._progress_at
            if silent > self._limit + self._allowance:
                self.end_process(
                    f"no progress for {silent:.0f} s in phase {self._status.phase}, after step"
                    f" {self._status.step} (stability.stallTimeoutSeconds is {self._limit:.0f}): rank {self._rank}"
                    " hangs, or waits for one that does",
                    caused_by_peer=False,
                )
            # This sleep, the interval between two checks, delays no other thread, because no thread waits for this
            # thread.
            time.sleep(self._interval)
