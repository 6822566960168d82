"""kill -9 of a rank at any moment: the next start goes on from something complete, and comes to the same model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.plan import Inputs
from tests.trainer import tiny
from tests.trainer.faults import POINTS
from tests.trainer.gangs import step_rows, write_plans
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_recovery import artifact_files, committed_steps
from tests.trainer.test_store_faults import assert_every_commit_verifies
from tests.trainer.zygote import Zygote, zygote

STEPS, EVERY = 60, 3
ONLY_FIRST = ("manifest", "commit", "committed")
"""Points that only rank 0 comes to."""
KILLED = -9


@pytest.fixture(scope="module")
def ranks() -> Iterator[Zygote]:
    with zygote() as running:
        yield running


def a_fault(round_: int, rng: random.Random) -> dict[str, Any]:
    """Return the kill of a round: every point in turn, the rest at random."""
    point = POINTS[round_ % len(POINTS)]
    rank = 0 if point in ONLY_FIRST else rng.randrange(2)
    # Two backward passes a step, some tensors a snapshot: all of them come after the first checkpoint of the round.
    most = {"accumulation": 2 * 3 * EVERY, "snapshot": 60, "upload": 3}.get(point, 2)
    least = {"accumulation": 2 * EVERY, "snapshot": 30, "upload": 2}.get(point, 2)
    return {
        "kind": "kill",
        "rank": rank,
        "point": point,
        "count": rng.randint(least, most),
        "delay": rng.uniform(0, 0.01),
    }


def play(ranks: Zygote, store: ObjectStore, model: Path, folder: Path, rounds: int, seed: int) -> None:
    """Kill a run ``rounds`` times and let it end; compare it with one that nobody disturbed."""
    rng = random.Random(seed)
    rows = tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1))
    inputs = Inputs(model=model, train=rows, validation=None)
    steps = STEPS + EVERY * rounds
    changes = {
        "optimization__maxSteps": steps,
        "storage__checkpointEverySteps": EVERY,
        "dataset__validation": None,
        "optimization__zeroStage": rng.choice([0, 2, 3]),
    }
    name, prefix = f"killed-{seed}", f"runs/default/killed-{seed}/uid-1/"

    def gang(config: dict[str, Any], where: Path, attempt: int, fault: dict[str, Any] | None) -> list[int]:
        plans = write_plans([config], inputs, where, credentials=store.credentials, faults=[fault], attempt=attempt)
        return ranks.gang(plans, where)

    quiet = run_config(store, f"quiet-{seed}", **changes)
    assert gang(quiet, folder / "quiet", 1, None) == [0, 0], (folder / "quiet" / "rank-0.log").read_text()
    config = run_config(store, name, **changes)
    for number in range(rounds):
        fault, where = a_fault(number, rng), folder / f"round-{number}"
        before = committed_steps(store, name)
        ends = gang(config, where, number + 1, fault)
        log = (where / "rank-0.log").read_text()
        assert ends[fault["rank"]] == KILLED, (fault, ends, log)
        assert_every_commit_verifies(store, prefix)
        runs = store.keys(f"{prefix}runs/")
        parent = json.loads(store.read(runs[-1])).get("parent")
        assert (parent["step"] if parent else None) == (before[-1] if before else None), (fault, log)
    where = folder / "last"
    assert gang(config, where, rounds + 1, None) == [0, 0], (where / "rank-0.log").read_text()
    losses = {row.step: row.loss for row in step_rows(store, name)}
    assert losses == {row.step: row.loss for row in step_rows(store, f"quiet-{seed}")}
    assert artifact_files(store, name) == artifact_files(store, f"quiet-{seed}")


def test_trap_15_five_kills_and_the_same_model(
    ranks: Zygote, store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    play(ranks, store, tiny_model, tmp_path, rounds=5, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_trap_15_ten_kills_of_each_of_five_runs(
    ranks: Zygote, store: ObjectStore, tiny_model: Path, tmp_path: Path, seed: int
) -> None:
    play(ranks, store, tiny_model, tmp_path, rounds=10, seed=seed)
