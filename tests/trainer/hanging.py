"""One rank of `test_return_guard.py`: `python -m tests.trainer.hanging FOLDER EVENT`.

The ranks other than rank 0 wait for ever in a call of the C library, which holds no lock of Python, as a call waits
that synchronises with a GPU. EVENT is what happens to rank 0: it leaves without a word, or it receives SIGTERM. Each
rank leaves its outcome in FOLDER.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.signals import StopFlag
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.return_guard import ReturnGuard, return_seconds
from finetune_trainer.ranks.watchdog import Watchdog

STALL_SECONDS = 600.0
POLL_SECONDS = 0.1
LEAVES, STOPS = "leaves", "stops"
LEFT = 66
"""Exit status of rank 0 where it leaves."""


class GuardedGang(Gang):
    """A gang that demands the return of the training thread when rank 0 is gone, and after a SIGTERM."""

    guard: ReturnGuard

    def _heartbeat_loop(self, whole_store: dist.Store) -> None:
        threading.Thread(target=self._demand_return_at_stop, daemon=True).start()
        super()._heartbeat_loop(whole_store)
        self.guard.demand("rank 0 is gone", caused_by_peer=True)

    def _demand_return_at_stop(self) -> None:
        while not self.stop_requested():
            threading.Event().wait(POLL_SECONDS)
        seconds = return_seconds(self.guard.longest_pause)
        self.guard.demand("told to stop", caused_by_peer=False, seconds=seconds)


def a_call_that_never_returns() -> None:
    reader, _writer = os.pipe()
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


def main() -> None:
    stop = StopFlag()
    watchdog = Watchdog(Path(sys.argv[1]), int(os.environ["RANK"]), STALL_SECONDS, WorkerStatus(step=12))
    GuardedGang.guard = ReturnGuard(watchdog)
    gang = GuardedGang(device=torch.device("cpu"), stop=stop, watchdog=watchdog, stall_seconds=STALL_SECONDS)
    gang.check_stop()
    GuardedGang.guard.passed()
    if not gang.is_first:
        a_call_that_never_returns()
    if sys.argv[2] == LEAVES:
        os._exit(LEFT)
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        # The ranks can't agree to stop, because the other rank never comes.
        gang.check_stop()
    finally:
        watchdog.claim_end()


if __name__ == "__main__":
    main()
