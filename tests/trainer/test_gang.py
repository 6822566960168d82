"""Ranks that gather values all get the values of all ranks, or all get the first error. When a rank is killed while
other ranks wait for it, the waiting ranks leave too, with the right error message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.gathering import ALL_WELL, KILLED, MISTAKE
from tests.trainer.zygote import ends_of, zygote


def run_ranks(event: str, folder: Path, world: int = 3) -> list[str]:
    """Run `gathering.py` on ``world`` ranks, and return what each rank printed.

    ``event`` happens to rank 1 while the other ranks wait for rank 1.
    """
    ends_of(zygote().start_ranks("tests.trainer.gathering", [[event]] * world, folder))
    return [(folder / f"rank-{rank}.log").read_text().strip() for rank in range(world)]


@pytest.mark.gang
@pytest.mark.parametrize(
    ("event", "answers"),
    [
        (ALL_WELL, ["[0, 1, 2]"] * 3),
        (MISTAKE, ["UserError dataset.train: is empty"] * 3),
    ],
)
def test_every_rank_gets_what_all_made_or_the_first_error(event: str, answers: list[str], tmp_path: Path) -> None:
    assert run_ranks(event, tmp_path) == answers


@pytest.mark.long
def test_a_rank_that_is_killed_outside_a_collective_is_noticed(tmp_path: Path) -> None:
    first, _, third = run_ranks(KILLED, tmp_path)
    assert first.startswith("PeerLost another rank left: rank 1 was silent for ")
    assert third.startswith("PeerLost another rank left: ")
