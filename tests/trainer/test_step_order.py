"""Each micro-batch is made before the CPU waits for the GPU, and a step waits once: the order of the calls of whole
jobs, on the CPU, where the order is that of a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.call_order import calls_of
from tests.trainer.gangs import losses_of, step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

pytestmark = pytest.mark.gang

STEPS = 6
EVERY = 3
MICRO_BATCHES = 3
"""A global batch of six examples has three micro-batches of two."""
STOPPED_AT = 4
INFINITE_AT = 5
JOBS: Mapping[str, tuple[int | None, dict[str, Any] | None]] = {
    "plain": (None, None),
    "deepspeed": (2, None),
    "cut": (None, {"kind": "stop", "step": STOPPED_AT}),
    "back": (None, {"kind": "gradient", "step": INFINITE_AT}),
}
"""The ZeRO stage of each job, None for the plain engine, and its fault."""
NORM = ["read", "engine/plain_engine.py:gradient_norm"]
LOSS = ["read", "engine/host_copy.py:read"]
"""The CPU reads the loss from its own memory: the norm, which it has read before, was computed after the loss."""
TIES = LOSS
"""How many fp32 values lay in the middle between two numbers in bf16 after the update before. The CPU reads this from
its own memory too. A checkpoint after that update has read it already."""


@pytest.fixture(scope="module")
def calls(store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Train all jobs in one process, and resume the one that was stopped. Return the calls of each."""
    folder = tmp_path_factory.mktemp("order")
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(18, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(3, seed=2)),
    )
    configs, faults, results = list[dict[str, Any]](), list[dict[str, Any]](), list[Outcome]()
    for name, (stage, fault) in [*JOBS.items(), ("cut", (None, None))]:
        own = folder / f"{name}-{len(configs)}"
        own.mkdir()
        configs.append(
            run_config(
                store,
                f"order-{name}",
                world__nodes=1,
                optimization__zeroStage=stage,
                optimization__precision="bf16",
                optimization__maxSteps=STEPS,
                evaluation__everySteps=EVERY,
                storage__checkpointEverySteps=EVERY,
                stability={"onNonFinite": "RollBack"},
            )
        )
        recording = {"kind": "calls", "folder": str(own)}
        faults.append(recording if fault is None else {"kind": "both", "faults": [recording, fault]})
    results = [
        result.outcome
        for result in train_all(configs, inputs, folder / "runs", credentials=store.credentials, faults=list(faults))
    ]
    stopped = [Outcome.STOPPED if name == "cut" else Outcome.COMPLETED for name in JOBS]
    assert results == [*stopped, Outcome.COMPLETED]
    names = [*JOBS, "resumed"]
    files = sorted(folder.glob("*/calls-0.jsonl"), key=lambda file: int(file.parent.name.rpartition("-")[2]))
    return {name: calls_of(file) for name, file in zip(names, files, strict=True)}


def step(number: int, *, following: int | None, begins: bool = False, applied: bool = True) -> list[list[Any]]:
    """Return the calls of step ``number`` with the plain engine. ``following`` is the step of which the first
    micro-batch is made ahead. ``begins`` says that the step is the first one of a run."""
    made = [["made", number, 1]] if begins else []
    ties = [] if begins or number % EVERY == 1 else [TIES]
    for index in range(1, MICRO_BATCHES + 1):
        made += [["loss"], ["backward"]]
        if index < MICRO_BATCHES:
            made.append(["made", number, index + 1])
    ahead = [["made", following, 1]] if following is not None else []
    update = [["step"], ["gradient_norm"], *ties] if applied else [["discard_gradient"]]
    return [["train", number], *made, *ahead, ["gradient_norm"], NORM, LOSS, ["sum"], *update]


def steps_of(calls: list[list[Any]]) -> list[list[Any]]:
    """Return ``calls`` without those of evaluations, which come before the first step and after some steps, and without
    the checks of the model at the start of a run, also of a run after a rollback."""
    kept, between = [], True
    for call in calls:
        between = call[0] == "score" or (between and call[0] != "train")
        if not between:
            kept.append(call)
        between = between or call[0] == "discard_gradient"
    return kept


def test_the_next_micro_batch_is_made_before_the_cpu_waits_also_across_steps(calls: dict[str, list[list[Any]]]) -> None:
    wanted = []
    for number in range(1, STEPS + 1):
        wanted += step(number, following=number + 1 if number < STEPS else None, begins=number == 1)
    assert steps_of(calls["plain"]) == wanted


def test_an_evaluation_between_two_steps_leaves_the_micro_batch_that_was_made_ahead(
    calls: dict[str, list[list[Any]]],
) -> None:
    found = calls["plain"]
    after = found.index(["train", EVERY + 1])
    scored = found.index(["score"], found.index(["train", EVERY]))
    assert scored < after
    assert ["made", 0, 1] in found[scored:after], "the evaluation has micro-batches of its own"
    assert found.count(["made", EVERY + 1, 1]) == 1
    assert found[after + 1] == ["loss"]


def test_a_stopped_run_drops_what_it_made_ahead_and_the_next_run_makes_it_again(
    calls: dict[str, list[list[Any]]], store: ObjectStore
) -> None:
    wanted = []
    for number in range(1, STOPPED_AT):
        wanted += step(number, following=number + 1, begins=number == 1)
    assert steps_of(calls["cut"]) == wanted
    wanted = []
    for number in range(STOPPED_AT, STEPS + 1):
        wanted += step(number, following=number + 1 if number < STEPS else None, begins=number == STOPPED_AT)
    assert steps_of(calls["resumed"]) == wanted
    assert losses_of(store, "order-cut") == losses_of(store, "order-plain")


def test_a_rollback_drops_what_was_made_ahead_and_no_excluded_step_is_made(
    calls: dict[str, list[list[Any]]], store: ObjectStore
) -> None:
    """The gradient of step INFINITE_AT is infinite. The update of the step before may be the cause, so the next run
    leaves out the data of both steps."""
    wanted = []
    for number in range(1, INFINITE_AT + 1):
        infinite = number == INFINITE_AT
        wanted += step(number, following=number + 1, begins=number == 1, applied=not infinite)
    wanted += step(STEPS, following=None, begins=True)
    assert steps_of(calls["back"]) == wanted
    rows = step_rows(store, "order-back")
    assert [row.step for row in rows if row.tokens == 0] == [INFINITE_AT - 1, INFINITE_AT]


def test_at_zero_2_a_step_waits_for_the_norm_only(calls: dict[str, list[list[Any]]]) -> None:
    found = steps_of(calls["deepspeed"])
    begin = found.index(["train", 2])
    one = found[begin : found.index(["train", 3])]
    norm = one.index(["gradient_norm"])
    assert one[norm - 1] == ["made", 3, 1]
    assert [call for call in one if call[0] == "read"] == [["read", "engine/engine.py:_total_norm"], LOSS]
