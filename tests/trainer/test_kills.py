"""A rank or a launcher is killed with SIGKILL at arbitrary points. The next attempt resumes from the newest complete
checkpoint, or begins anew where there is none, and the final model equals that of an undisturbed run.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.faults import POINTS
from tests.trainer.gangs import run_plans, step_rows, write_plans
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import Attempt, children, run_config
from tests.trainer.test_background import newest_step
from tests.trainer.test_recovery import artifact_files, committed_steps
from tests.trainer.test_store_faults import assert_every_commit_verifies

STEPS, EVERY = 60, 3
ONLY_FIRST = ("manifest", "commit", "committed", "retention")
"""Points of `faults.POINTS` that only rank 0 reaches."""
KILLED = -9


def a_fault(round_: int, rng: random.Random) -> dict[str, Any]:
    """Return the fault that kills a rank in round ``round_``.

    Each round uses the next point of `POINTS`. The rank is killed when it reaches the point for the `count`-th time.
    `count` is random, but always 2 at the points `manifest`, `commit` and `committed`. The rank is random too, unless
    only rank 0 reaches the point.
    """
    point = POINTS[round_ % len(POINTS)]
    rank = 0 if point in ONLY_FIRST else rng.randrange(2)
    # The limits of `count` depend on how often a point is reached. For example, there are two backward passes per
    # step, several tensors per snapshot, and two deletions per checkpoint.
    most = {"accumulation": 2 * 3 * EVERY, "snapshot": 60, "upload": 3, "retention": 3}.get(point, 2)
    least = {"accumulation": 2 * EVERY, "snapshot": 30, "upload": 2, "retention": 1}.get(point, 2)
    return {
        "kind": "kill",
        "rank": rank,
        "point": point,
        "count": rng.randint(least, most),
        "delay": rng.uniform(0, 0.01),
    }


def play(store: ObjectStore, model: Path, folder: Path, rounds: int, seed: int) -> None:
    """Kill a job ``rounds`` times, then let the last attempt finish.

    Losses and artifact must equal those of an undisturbed job. Each seed begins with another point.
    """
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
        return run_plans(plans, where)

    quiet = run_config(store, f"quiet-{seed}", **changes)
    assert gang(quiet, folder / "quiet", 1, None) == [0, 0], (folder / "quiet" / "rank-0.log").read_text()
    config = run_config(store, name, **changes)
    for number in range(rounds):
        fault, where = a_fault(seed - 1 + number, rng), folder / f"round-{number}"
        before = committed_steps(store, name)
        ends = gang(config, where, number + 1, fault)
        log = (where / "rank-0.log").read_text()
        assert ends[fault["rank"]] == KILLED, (fault, ends, log)
        assert_every_commit_verifies(store, prefix)
        assert newest_parent(store, prefix) == (before[-1] if before else None), (fault, log)
    where = folder / "last"
    assert gang(config, where, rounds + 1, None) == [0, 0], (where / "rank-0.log").read_text()
    losses = {row.step: row.loss for row in step_rows(store, name)}
    assert losses == {row.step: row.loss for row in step_rows(store, f"quiet-{seed}")}
    assert artifact_files(store, name) == artifact_files(store, f"quiet-{seed}")


def newest_parent(store: ObjectStore, prefix: str) -> int | None:
    """Return the step from which the newest run resumed, or None if that run began with the base model."""
    parent = json.loads(store.read(store.keys(f"{prefix}runs/")[-1])).get("parent")
    return parent["step"] if parent else None


@pytest.mark.gang
def test_trap_15_five_kills_and_the_same_model(store: ObjectStore, tiny_model: Path, tmp_path: Path) -> None:
    play(store, tiny_model, tmp_path, rounds=5, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_trap_15_ten_kills_of_each_of_five_runs(
    store: ObjectStore, tiny_model: Path, tmp_path: Path, seed: int
) -> None:
    play(store, tiny_model, tmp_path, rounds=10, seed=seed)


OWN_PROCESSES = ("--pid", "--fork", "--kill-child")
"""Options with which `unshare` makes the launcher PID 1, as in its container.

When PID 1 ends, the kernel kills all other processes of its PID namespace.
"""


def is_gone(process: int) -> bool:
    """Return whether the process with the id ``process`` has exited. A zombie, which its parent has not reaped yet,
    has exited too."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def has_reached(attempt: Attempt, step: int) -> bool:
    """Return whether the attempt has trained ``step``."""
    return newest_step(attempt) >= step


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_launcher_takes_its_workers_along_and_the_next_attempt_comes_to_the_same_model(
    store: ObjectStore, pods: StartPods, tiny_model: Path, tmp_path: Path
) -> None:
    """The launcher of each pod is killed once as PID 1 of a container, and once as an ordinary process.

    The workers of an ordinary process must notice the end of their launcher themselves.
    """
    unshare = shutil.which("unshare")
    assert unshare is not None
    rng = random.Random(7)
    name, prefix = "headless", "runs/default/headless/uid-1/"
    changes = {"optimization__maxSteps": 400, "storage__checkpointEverySteps": EVERY, "dataset__validation": None}
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1))
    plans = write_plans(
        [run_config(store, "quiet-headless", **changes)],
        Inputs(model=tiny_model, train=rows, validation=None),
        tmp_path / "quiet",
        credentials=store.credentials,
    )
    assert run_plans(plans, tmp_path / "quiet") == [0, 0], (tmp_path / "quiet" / "rank-0.log").read_text()

    config = run_config(store, name, **changes)
    for number, (victim, contained) in enumerate(itertools.product((0, 1), (True, False)), start=1):
        before = committed_steps(store, name)
        wrapper = (unshare, *OWN_PROCESSES) if contained else ()
        attempt = pods(config, attempt=number, wrapper=wrapper)
        some = (before[-1] if before else 0) + rng.randint(2, 8 * EVERY)
        attempt.wait_for(partial(has_reached, attempt, some), f"step {some}")
        pod = attempt.pods[victim]
        launcher = children(pod.process.pid)[0] if contained else pod.process.pid
        workers = children(launcher)
        assert workers
        os.kill(launcher, signal.SIGKILL)
        ends = attempt.wait()
        # Without a container, the workers receive SIGTERM when their launcher ends, inform the other ranks and save a
        # checkpoint. In a container, the kernel kills the workers at once, so the ranks of the other pod lose a peer.
        assert contained or ends[victim] == KILLED, attempt.output
        assert ends[1 - victim] == (75 if contained else 143), attempt.output
        attempt_ended = time.monotonic()
        while not all(is_gone(worker) for worker in workers):
            assert time.monotonic() < attempt_ended + 75, f"{workers} outlive their launcher:\n{attempt.output}"
            # Pause between two checks; the assertion above bounds their total time.
            time.sleep(0.1)
        assert_every_commit_verifies(store, prefix)
        assert newest_parent(store, prefix) == (before[-1] if before else None), attempt.output
        assert committed_steps(store, name)[-1:] >= before[-1:]
    last = pods(config, attempt=5)
    assert last.wait() == [0, 0], last.output
    assert {row.step: row.loss for row in step_rows(store, name)} == {
        row.step: row.loss for row in step_rows(store, "quiet-headless")
    }
    assert artifact_files(store, name) == artifact_files(store, "quiet-headless")
