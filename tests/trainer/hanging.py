"""One rank of `test_return_guard.py`: `python -m tests.trainer.hanging FOLDER EVENT`.

Rank 1 waits for ever in a call of the C library, which holds no lock of Python, as a call waits that synchronises with
a GPU. EVENT is what happens before: rank 0 leaves without a word, rank 0 receives SIGTERM, all ranks have agreed to
stop after a SIGTERM, or all ranks have agreed to stop and copy their training state. Each rank leaves its outcome in
FOLDER.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch

from finetune_trainer.pod.errors import StopAgreed
from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.signals import STOP_SIGNALS, StopFlag
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.return_guard import LEAST_SECONDS, ReturnGuard
from finetune_trainer.ranks.watchdog import Watchdog

STALL_SECONDS = 600.0
COPY_SECONDS = LEAST_SECONDS / 3
LEAVES, STOPS, AGREES, COPIES = "leaves", "stops", "agrees", "copies"
LEFT = 66
"""Exit status of rank 0 where it leaves."""


def a_call_that_never_returns() -> None:
    # A call of CUDA does not return at a signal either, which the kernel then delivers to another thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    reader, _writer = os.pipe()
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


def act(gang: Gang, event: str) -> None:
    for _ in range(3):
        gang.check_stop()
    if event in (LEAVES, STOPS) and not gang.is_first:
        a_call_that_never_returns()
    if event == LEAVES:
        os._exit(LEFT)
    if gang.is_first:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        # With `STOPS` the ranks can't agree to stop, because rank 1 never comes.
        while True:
            gang.check_stop()
    except StopAgreed:
        if event == COPIES and not gang.is_first:
            with gang.within(COPY_SECONDS, "the copy of the training state"):
                gang.note_progress()
                a_call_that_never_returns()
        if not gang.is_first:
            a_call_that_never_returns()
        # Rank 0 waits for rank 1, with which it copies the training state.
        gang.any_rank(False)


def main() -> None:
    watchdog = Watchdog(Path(sys.argv[1]), int(os.environ["RANK"]), STALL_SECONDS, WorkerStatus(step=12))
    guard = ReturnGuard(watchdog)
    gang = Gang(
        device=torch.device("cpu"), stop=StopFlag(), watchdog=watchdog, guard=guard, stall_seconds=STALL_SECONDS
    )
    try:
        act(gang, sys.argv[2])
    finally:
        watchdog.claim_end()


if __name__ == "__main__":
    main()
