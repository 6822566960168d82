"""One rank of `test_return_guard.py`: `python -m tests.trainer.hanging FOLDER`. Rank 0 leaves without a word. The other
ranks wait for ever in a call of the C library, which holds no lock of Python, as a call waits that synchronises with a
GPU. Each of these ranks leaves its outcome in FOLDER."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.return_guard import ReturnGuard
from finetune_trainer.ranks.watchdog import Watchdog

STALL_SECONDS = 600.0
LEFT = 66
"""Exit status of rank 0."""


class GuardedGang(Gang):
    """A gang that demands the return of the training thread when rank 0 is gone."""

    guard: ReturnGuard

    def _heartbeat_loop(self, whole_store: dist.Store) -> None:
        super()._heartbeat_loop(whole_store)
        self.guard.demand("rank 0 is gone", caused_by_peer=True)


def a_call_that_never_returns() -> None:
    reader, _writer = os.pipe()
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


def main() -> None:
    watchdog = Watchdog(Path(sys.argv[1]), int(os.environ["RANK"]), STALL_SECONDS, WorkerStatus(step=12))
    GuardedGang.guard = ReturnGuard(watchdog)
    gang = GuardedGang(device=torch.device("cpu"), watchdog=watchdog, stall_seconds=STALL_SECONDS)
    gang.check_stop()
    GuardedGang.guard.passed()
    if gang.is_first:
        os._exit(LEFT)
    a_call_that_never_returns()


if __name__ == "__main__":
    main()
