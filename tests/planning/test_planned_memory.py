"""The plan's memory is what the trainer's own engine takes.

`measured_memory.json` holds what `engine_memory.py` measured of each case. The command `python -m
tests.planning.test_planned_memory` measures all cases and writes the file anew, and with names of cases only those.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from finetune_core.planning import engine_memory
from finetune_core.planning.activations import MEASURED_FAMILIES
from finetune_core.planning.memory import STEP_PHASES, Phase
from finetune_trainer.engine import config, gradient_norm, masters
from tests.planning.engine_memory import Measurement, measure_all
from tests.planning.memory_cases import CASES, MODELS
from tests.planning.planned_cases import planned, setup_of

STORED = Path(__file__).with_name("measured_memory.json")
QUICK = ("7b-lora-z2-512x8", "7b-full-z3-512x8-accumulated")
"""Cases that are measured in each run of the tests, with one process and with every kind of buffer."""
GROUPS = ([name for name in CASES if CASES[name].processes == 1], [name for name in CASES if CASES[name].processes > 1])
MEDIAN_ERROR = 0.03
"""Largest median of the plan's error, as a share of the measured peak."""
LOW = 0.02
"""By which share of the measured peak the plan may be too low at most."""
SECONDS = 600


def stored() -> dict[str, Measurement]:
    """Return the stored measurements, by the name of the case."""
    return {name: Measurement(**values) for name, values in json.loads(STORED.read_text(encoding="utf-8")).items()}


def errors(measured: dict[str, Measurement]) -> dict[str, float]:
    """Return the plan's error of the peak of an optimizer step for each measurement, as a share of the measured
    peak."""
    return {name: planned(CASES[name]).step_peak / found.peak - 1 for name, found in measured.items()}


def test_the_plan_has_the_sizes_of_the_trainer() -> None:
    """The plan has copies of these numbers, because the core does not import the trainer."""
    assert engine_memory.UPDATED_ELEMENTS == masters.BATCH_ELEMENTS
    assert engine_memory.SMALL_ELEMENTS == masters.SMALL_ELEMENTS
    assert engine_memory.WAITING_ELEMENTS == masters.WAITING_ELEMENTS
    assert engine_memory.NORM_PIECE_BYTES == 8 * gradient_norm.NORM_ELEMENTS
    assert engine_memory.BUCKET_ELEMENTS == config.BUCKET_ELEMENTS


def test_every_case_was_measured() -> None:
    assert stored().keys() == CASES.keys()
    assert len(CASES) >= 24
    assert {MODELS[case.model]["model_type"] for case in CASES.values()} == MEASURED_FAMILIES


def test_the_plan_is_right_on_average_and_never_much_too_low() -> None:
    found = errors(stored())
    assert statistics.median(map(abs, found.values())) <= MEDIAN_ERROR
    assert {name: error for name, error in found.items() if error < -LOW} == {}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_the_parameters_that_the_engine_has(name: str) -> None:
    setup, found = setup_of(CASES[name]), stored()[name]
    assert (setup.parameters, setup.trained_parameters) == (found.parameters, found.trained)


@pytest.mark.parametrize("name", CASES)
def test_what_stands_between_two_steps_and_the_checkpoint_are_exact(name: str) -> None:
    """Weights, optimizer state, gradients and buffers follow from counts alone, so only small tensors are left out."""
    plan, found = planned(CASES[name]), stored()[name]
    assert plan.standing == pytest.approx(found.standing, rel=0.005)
    assert plan.phases[Phase.CHECKPOINT] == pytest.approx(found.checkpoint, rel=0.005)


@pytest.mark.parametrize("name", CASES)
def test_the_parts_add_up_to_the_highest_peak(name: str) -> None:
    plan = planned(CASES[name])
    assert sum(plan.parts.values()) == plan.peak
    assert min(plan.parts.values()) >= 0
    assert plan.step_peak == max(plan.phases[phase] for phase in STEP_PHASES)


def assert_measured_again(names: list[str]) -> None:
    """Assert that the engine takes as much memory in the cases ``names`` as is stored."""
    known = stored()
    assert measure_all(names) == {name: known[name] for name in names}, (
        "the engine takes other memory: run .venv/bin/python -m tests.planning.test_planned_memory, and make docs"
    )


@pytest.mark.timeout(SECONDS)
def test_the_engine_takes_the_memory_that_is_stored() -> None:
    assert_measured_again(list(QUICK))


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("names", GROUPS, ids=["one-process", "eight-processes"])
def test_the_engine_takes_the_memory_that_is_stored_in_every_case(names: list[str]) -> None:
    assert_measured_again(names)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(CASES)
    values = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    values |= {name: asdict(found) for name, found in measure_all(chosen).items()}
    ordered = {name: values[name] for name in CASES if name in values}
    STORED.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
