"""Starts `many_runs` on several ranks, and reads what the runs wrote into the bucket and into the folders of the
ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_core.contract import Identity, Result, RunConfig
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.storage.step_log import StepRow
from tests.trainer.objectstore import ObjectStore
from tests.trainer.zygote import END_SECONDS, ends_of, zygote

RUN_SECONDS = 480


def write_plans(
    configs: list[dict[str, Any]],
    inputs: Inputs | list[Inputs],
    folder: Path,
    *,
    credentials: Path,
    faults: list[dict[str, Any] | None] | None = None,
    attempt: int = 1,
) -> list[Path]:
    """Write for each rank the file that `many_runs` reads, with the plans of all runs. Return the files in the order of
    ranks. The scratch folder of a node is `rank-<rank>` in ``folder``, with the number of the node's first rank."""
    files = []
    per_node = configs[0]["world"]["processesPerNode"]
    for rank in range(configs[0]["world"]["nodes"] * per_node):
        node_rank, local_rank = divmod(rank, per_node)
        scratch = folder / f"rank-{rank - local_rank}"
        identity = Identity(
            namespace="default", name="test", uid="u", attempt=attempt, pod_name="p", pod_uid="p", node_rank=node_rank
        )
        plans = []
        for index, config in enumerate(configs):
            plan = WorkerPlan(
                paths=Paths(credentials=credentials, scratch=scratch),
                identity=identity,
                config=RunConfig.model_validate(config),
                inputs=inputs[index] if isinstance(inputs, list) else inputs,
                folder=scratch / f"run-{index}",
            )
            plans.append({"plan": json.loads(plan.to_json()), "fault": faults[index] if faults else None})
        scratch.mkdir(parents=True, exist_ok=True)
        file = folder / f"plans-{rank}.json"
        file.write_text(json.dumps(plans))
        files.append(file)
    return files


def run_plans(plans: list[Path], logs: Path, *, seconds: float = END_SECONDS, per_node: int = 1) -> list[int]:
    """Run `many_runs` on one rank for each file in ``plans``, and return the exit statuses of the ranks, see `ends_of`.
    Each node has ``per_node`` ranks. The output of a rank goes to the file `rank-<rank>.log` in the folder ``logs``."""
    ranks = zygote().start_ranks("tests.trainer.many_runs", [[str(file)] for file in plans], logs, per_node=per_node)
    return ends_of(ranks, seconds)


def train_all(
    configs: list[dict[str, Any]],
    inputs: Inputs | list[Inputs],
    folder: Path,
    *,
    credentials: Path,
    seconds: float = RUN_SECONDS,
    faults: list[dict[str, Any] | None] | None = None,
) -> list[Result]:
    """Train every config, one after another, and return the result of each run.

    All configs must have the same number of ranks. ``inputs`` are either common to all configs or one per config.
    ``faults`` has one entry per config, see `faults.scripted`.
    """
    per_node = configs[0]["world"]["processesPerNode"]
    world = configs[0]["world"]["nodes"] * per_node
    plans = write_plans(configs, inputs, folder, credentials=credentials, faults=faults)
    codes = run_plans(plans, folder, seconds=seconds, per_node=per_node)
    logs = "\n".join((folder / f"rank-{rank}.log").read_text() for rank in range(world))
    assert codes == [0] * world, logs
    made = [
        json.loads((folder / f"rank-{rank - rank % per_node}" / f"results-{rank}.json").read_text())
        for rank in range(world)
    ]
    assert all(other == made[0] for other in made), made
    return [Result.model_validate(result) for result in made[0]]


def step_rows(store: ObjectStore, name: str) -> list[StepRow]:
    """Return the rows of a job's step log, in the order of steps."""
    lines = [
        line
        for key in store.keys(f"runs/default/{name}/uid-1/metrics/")
        for line in store.read(key).decode().splitlines()
    ]
    return sorted((StepRow.model_validate_json(line) for line in lines), key=lambda row: row.step)


def losses_of(store: ObjectStore, name: str) -> list[float]:
    """Return the loss of each step of a job. Every step must have a loss, so no step may have been skipped."""
    losses = [row.loss for row in step_rows(store, name)]
    assert None not in losses, name
    return [loss for loss in losses if loss is not None]


def rows_consumed(folder: Path, index: int, world: int, *, per_node: int = 1) -> dict[int, list[int]]:
    """Return, by step, the sorted numbers of the rows that all ranks together consumed in run ``index`` (counted from
    0) of `train_all`. Each node had ``per_node`` ranks."""
    consumed: dict[int, list[int]] = {}
    for rank in range(world):
        run = folder / f"rank-{rank - rank % per_node}" / f"run-{index}"
        for line in (run / f"rows-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            consumed.setdefault(row["step"], []).extend(row["own"])
    return {step: sorted(rows) for step, rows in consumed.items()}
