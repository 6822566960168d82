"""One rank of the tests of a stall in `test_leaving.py`: `python -m tests.trainer.stalling FOLDER RANK`. The rank with
the number RANK hangs in its sixth step. Each rank leaves its outcome in FOLDER."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch

from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.watchdog import Watchdog

STALL_SECONDS = 2.0


def a_call_that_hangs() -> None:
    threading.Event().wait()


def main() -> None:
    status = WorkerStatus(step=12, phase="Training")
    watchdog = Watchdog(Path(sys.argv[1]), int(os.environ["RANK"]), STALL_SECONDS, status)
    with watchdog.allow(60):
        gang = Gang(device=torch.device("cpu"), watchdog=watchdog, stall_seconds=STALL_SECONDS)
    try:
        for step in range(1000):
            gang.check_stop()
            if gang.rank == int(sys.argv[2]) and step == 5:
                a_call_that_hangs()
    finally:
        # If the watchdog of this rank is reporting a stall, `claim_end` does not return. So an error because the other
        # ranks left does not interrupt the report. `worker.py` does the same.
        watchdog.claim_end()


if __name__ == "__main__":
    main()
