"""One pod of `test_rendezvous.py`, with one rank: `python -m tests.trainer.joining FOLDER FOREIGN_KEYS_BEATS`.

The rank opens the rendezvous, and joins the other ranks once the file `join` is in FOLDER. The rank then talks to the
other ranks until the file `enough` is there too. FOREIGN_KEYS_BEATS takes the place of the constant in `gang.py`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from finetune_trainer.ranks import gang as gangs
from finetune_trainer.ranks.gate import open_rendezvous


def main() -> None:
    folder = Path(sys.argv[1])
    gangs.FOREIGN_KEYS_BEATS = int(sys.argv[2])
    rank, nodes, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    with open_rendezvous(
        first=rank == 0, nodes=nodes, address="127.0.0.1", port=port, key=lambda: os.environ["KEY"].encode()
    ) as rendezvous:
        while not (folder / "join").exists():
            # Pause between two checks. The test ends this process when the time of the test is over.
            time.sleep(0.05)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = rendezvous.address, str(rendezvous.port)
        gang = gangs.Gang(device=torch.device("cpu"))
        print("joined", flush=True)
        while not any(gang.gather(lambda: (folder / "enough").exists())):
            pass
        gang.check_stop()
        print("stop requested:", gang.stop_requested(), flush=True)
        gang.final_barrier()
        # Close the connection of the gang before the end of the block closes the gate or relay of the rendezvous. In a
        # pod the order is the same: the worker ends before its launcher, which holds the gate or relay.
        del gang
    os._exit(0)


if __name__ == "__main__":
    main()
