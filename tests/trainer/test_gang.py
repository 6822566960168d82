"""When a rank exits while other ranks wait for it, these ranks leave too, each with the right error message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.objectstore import free_port

PROGRAM = """
import os, torch
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import PeerLost
from finetune_trainer.ranks.gang import Gang
gang = Gang(device=torch.device("cpu"))
def work():
    if gang.rank == 1:
        {event}
    return gang.rank
try:
    print(gang.gather(work), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
    if isinstance(error, PeerLost):
        os._exit(0)
gang.final_barrier()
os._exit(0)
"""


def run_ranks(event: str, folder: Path, world: int = 3) -> list[str]:
    """Start ``world`` ranks, and return what each rank printed.

    Rank 1 runs the code ``event`` while the other ranks wait for it.
    """
    program, port = PROGRAM.replace("{event}", event), free_port()
    ranks = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        log = (folder / str(rank)).open("wb")
        ranks.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=log))
        log.close()
    for process in ranks:
        process.wait(120)
    return [(folder / str(rank)).read_text().strip() for rank in range(world)]


@pytest.mark.parametrize(
    ("event", "answers"),
    [
        ("pass", ["[0, 1, 2]"] * 3),
        ("raise UserError('dataset.train', 'is empty')", ["UserError dataset.train: is empty"] * 3),
    ],
    ids=["all well", "a person's error"],
)
def test_every_rank_gets_what_all_made_or_the_first_error(event: str, answers: list[str], tmp_path: Path) -> None:
    assert run_ranks(event, tmp_path) == answers


@pytest.mark.long
def test_a_rank_that_is_killed_outside_a_collective_is_noticed(tmp_path: Path) -> None:
    first, _, third = run_ranks("os.kill(os.getpid(), 9)", tmp_path)
    assert first.startswith("PeerLost another rank left: rank 1 was silent for ")
    assert third.startswith("PeerLost another rank left: ")
