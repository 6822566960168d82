"""One rank of `test_gang.py`: `python -m tests.trainer.gathering EVENT`. EVENT, for example "killed", is what happens
to rank 1 while the other ranks wait for the answer of rank 1.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import PeerLost
from finetune_trainer.ranks.gang import Gang

ALL_WELL, MISTAKE, KILLED = "all well", "a person's error", "killed"


def main() -> None:
    gang = Gang(device=torch.device("cpu"))

    def work() -> int:
        if gang.rank == 1 and sys.argv[1] == MISTAKE:
            raise UserError("dataset.train", "is empty")
        if gang.rank == 1 and sys.argv[1] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return gang.rank

    try:
        print(gang.gather(work), flush=True)
    except Exception as error:  # noqa: BLE001  (the test compares the text)
        print(type(error).__name__, error, flush=True)
        if isinstance(error, PeerLost):
            os._exit(0)
    gang.final_barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
