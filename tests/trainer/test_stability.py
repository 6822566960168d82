"""Diverging training is noticed within eight steps, healthy training raises no alarm, and the reaction is the one that
the job specifies.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from finetune_core.contract import Outcome, Result, RunConfig
from finetune_trainer.decisions.recovery import SKIPPED_STEPS_AFTER_ALARM, RollbackRequired, is_skipped, plan_recovery
from finetune_trainer.decisions.schedule import learning_rate_at
from finetune_trainer.decisions.stability import (
    Alarm,
    AlarmKind,
    MonitorState,
    monitor_after,
    non_finite_alarm,
    observe,
)
from finetune_trainer.pod.errors import Diverged
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.lineage import Rollback, RunRecord
from tests.trainer import curves, tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

Curve = list[tuple[float, float]]
ONSET = 100
SEEDS = 20
WITHIN = 8


def alarms(curve: Curve) -> list[Alarm]:
    """Return the alarms that the stability monitor raises for a curve, a list of pairs (loss, gradient norm)."""
    watch, found = MonitorState(), []
    for step, (loss, norm) in enumerate(curve, start=1):
        alarm = non_finite_alarm(step, loss, norm)
        if alarm is None:
            watch, alarm = observe(watch, step, loss, norm)
        if alarm is not None:
            found.append(alarm)
    return found


def random_words(step: curves.Step, share: float) -> None:
    hit = torch.rand(step.targets.shape, generator=step.generator) < share
    wrong = torch.randint(curves.WORDS, step.targets.shape, generator=step.generator)
    step.targets = torch.where(hit, wrong, step.targets)


def label_noise(step: curves.Step) -> None:
    if step.number >= ONSET:
        random_words(step, 1.0)


def thirty_times_the_rate(step: curves.Step) -> None:
    if step.number >= ONSET:
        step.rate *= 30


def infinite_gradient(step: curves.Step) -> None:
    if step.number == ONSET:
        step.gradient_factor = math.inf


def slow_drift(step: curves.Step) -> None:
    """Replace a share of the target words by random words: 4 % in step ONSET, and 4 percentage points more with each
    step."""
    if step.number >= ONSET:
        random_words(step, 0.04 * (step.number - ONSET + 1))


def half_of_the_labels(step: curves.Step) -> None:
    if step.number >= ONSET:
        random_words(step, 0.5)


def test_trap_26_twenty_clean_seeds_raise_no_alarm() -> None:
    torch.set_num_threads(1)
    clean = curves.train(SEEDS, 200)
    assert all(curve[-1][0] < 0.5 * curve[0][0] for curve in clean)  # The losses halve, so the models do learn.
    assert [alarm.describe() for curve in clean for alarm in alarms(curve)] == []


@pytest.mark.parametrize(
    "fault", [label_noise, thirty_times_the_rate, infinite_gradient, slow_drift, half_of_the_labels]
)
def test_trap_26_a_fault_is_noticed_within_eight_steps(fault: Callable[[curves.Step], None]) -> None:
    torch.set_num_threads(1)
    for seed, curve in enumerate(curves.train(SEEDS, ONSET + WITHIN - 1, fault, first_seed=7)):
        found = alarms(curve)
        assert found, f"seed {seed}: nothing was noticed: {curve[ONSET - 4 :]}"
        assert ONSET <= found[0].step < ONSET + WITHIN, found[0]
        assert found[0].value > found[0].threshold or fault is infinite_gradient
        assert found[0].first >= ONSET - WITHIN


def test_one_odd_batch_is_no_alarm_and_several_are() -> None:
    calm = [(1.0 + 0.05 * math.sin(step), 0.5) for step in range(60)]
    assert alarms([*calm, (9.0, 5.0), *calm]) == []
    (alarm, *_) = alarms([*calm, *[(9.0, 5.0)] * 4])
    assert 61 < alarm.step <= 64
    assert alarm.first == 61


def test_what_the_monitor_remembers_does_not_depend_on_a_resume() -> None:
    curve = [(2.0 / math.sqrt(step), 1.0 / step) for step in range(1, 90)]
    straight = MonitorState()
    for step, (loss, norm) in enumerate(curve, start=1):
        straight, _ = observe(straight, step, loss, norm)
    assert monitor_after((step, loss, norm) for step, (loss, norm) in enumerate(curve, start=1)) == straight
    assert MonitorState.model_validate_json(straight.to_json()) == straight


def config_of(**stability: Any) -> RunConfig:
    class Nowhere:
        endpoint = "http://127.0.0.1:1"

    config = run_config(Nowhere(), "pure")  # type: ignore[arg-type]
    return RunConfig.model_validate(config | {"stability": stability})


SPIKE = Alarm(kind=AlarmKind.LOSS_SPIKE, step=64, first=61, value=9.0, threshold=1.5)
INFINITE = Alarm(kind=AlarmKind.NON_FINITE_GRADIENT, step=64, first=64, value=math.nan, threshold=math.inf)


@pytest.mark.parametrize(
    ("alarm", "stability", "before", "action", "order"),
    [
        (SPIKE, {"onExplodingLoss": "Record"}, 0, "Record", None),
        (SPIKE, {"onExplodingLoss": "RollBack"}, 0, "RollBack", RollbackRequired),
        (SPIKE, {"onExplodingLoss": "RollBack"}, 2, "RollBack", RollbackRequired),
        (SPIKE, {"onExplodingLoss": "RollBack"}, 3, "Fail", Diverged),
        (SPIKE, {"onExplodingLoss": "Fail"}, 0, "Fail", Diverged),
        (INFINITE, {}, 0, "Fail", Diverged),
        (INFINITE, {"onNonFinite": "Record"}, 0, "Record", None),
        (INFINITE, {"onNonFinite": "RollBack"}, 0, "RollBack", RollbackRequired),
    ],
)
def test_what_follows_an_alarm(
    alarm: Alarm, stability: dict[str, str], before: int, action: str, order: type[Exception] | None
) -> None:
    earlier = [Rollback(step=1, rate_factor=0.3, skip_from=2, skip_to=3, reason="")] * before
    incident, raised = plan_recovery(alarm, config_of(**stability), earlier)
    assert (incident.step, incident.action, incident.kind) == (64, action, alarm.kind.value)
    assert raised is None if order is None else isinstance(raised, order)
    if isinstance(raised, RollbackRequired):
        rollback = raised.rollback
        # The loss of a step results from the update of the step before. So the data of the step before `alarm.first`
        # is skipped too, and the rollback returns at least to the step before that one. For a rising loss it returns
        # further, to step 56, because the rise may have begun before the monitor noticed it.
        assert (rollback.step, rollback.rate_factor) == (62 if alarm is INFINITE else 56, 0.3)
        last = 64 if alarm is INFINITE else 72
        assert [step for step in range(50, 80) if is_skipped(step, [rollback])] == list(
            range(alarm.first - 1, last + 1)
        )
    if isinstance(raised, Diverged):
        assert "lower training.learningRate (it is 0.001)" in str(raised)


def test_trap_22_the_rate_is_a_function_of_step_and_rollbacks_alone() -> None:
    optimization = config_of().optimization.model_copy(update={"schedule": "Linear", "warmup_steps": 10})
    first = Rollback(step=40, rate_factor=0.3, skip_from=44, skip_to=50, reason="")
    second = Rollback(step=60, rate_factor=0.3, skip_from=61, skip_to=61, reason="")
    plain = [learning_rate_at(step, 100, optimization) for step in range(1, 101)]
    lowered = [learning_rate_at(step, 100, optimization, [first, second]) for step in range(1, 101)]
    assert plain[0] == pytest.approx(1e-4)  # The warm-up begins at a tenth of the learning rate, not at zero.
    assert plain[9] == pytest.approx(1e-3)
    assert lowered[:40] == plain[:40]
    assert lowered[40:60] == pytest.approx([0.3 * value for value in plain[40:60]])
    assert lowered[60:] == pytest.approx([0.09 * value for value in plain[60:]])


STEPS, FAULT = 150, 80
RATE_OF_RUNS = 6e-3
NOISE = {"kind": "noise", "step": FAULT, "share": 1.0, "growth": 0.0, "steps": 6}
DRIFT = {"kind": "noise", "step": FAULT, "share": 0.0, "growth": 0.1, "steps": 10}
RATE = {"kind": "rate", "step": FAULT, "factor": 30}
GRADIENT = {"kind": "gradient", "step": FAULT}
ROLL_BACK = {"onNonFinite": "RollBack", "onExplodingLoss": "RollBack"}
RECORD = {"onNonFinite": "Record", "onExplodingLoss": "Record"}


def plateau_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return rows whose answers have three words, one of which is random.

    The model soon learns the two other words. Then the loss stays on a plateau.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = rng.choice(tiny.WORDS[10:20])
        rows.append({"question": f"{word} {word}", "reply": f"{word} {rng.choice(tiny.WORDS[:4])} w30"})
    return rows


def fault_config(store: ObjectStore, name: str, stability: dict[str, str], *, world: int) -> dict[str, Any]:
    config = run_config(
        store,
        name,
        world__nodes=world,
        method="Full",
        optimization__learningRate=RATE_OF_RUNS,
        optimization__maxSteps=STEPS,
        optimization__zeroStage=3 if world > 1 else 2,
        optimization__globalBatchSize=16,
        optimization__microBatchSize=16 // world,
        storage__checkpointEverySteps=10,
        evaluation__everySteps=30,
    )
    return config | {"stability": stability}


def inputs_of(model: Path, folder: Path) -> Inputs:
    return Inputs(
        model=model,
        train=tiny.write_jsonl(folder / "train.jsonl", plateau_rows(400, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", plateau_rows(64, seed=2)),
    )


def final_loss(store: ObjectStore, name: str) -> float:
    value = step_rows(store, name)[-1].perplexity
    assert value is not None
    return math.log(value)


def record_of(store: ObjectStore, name: str, run: int) -> RunRecord:
    return RunRecord.model_validate_json(store.read(f"runs/default/{name}/uid-1/runs/{run:06d}.json"))


def run_faults(
    store: ObjectStore,
    model: Path,
    folder: Path,
    cases: list[tuple[str, dict[str, str], dict[str, Any] | None]],
    *,
    world: int,
    prefix: str,
) -> list[Result]:
    configs = [fault_config(store, f"{prefix}-{name}", stability, world=world) for name, stability, _ in cases]
    return train_all(
        configs,
        inputs_of(model, folder),
        folder,
        credentials=store.credentials,
        faults=[fault for _, _, fault in cases],
    )


@pytest.mark.gang
def test_a_fault_is_rolled_back_and_a_step_that_is_not_finite_is_left_out(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """This test also covers trap 14, an infinite gradient.

    The step with the infinite gradient is reported and counted, its update is not applied, and the learning rate
    schedule continues.
    """
    cases = [("clean", ROLL_BACK, None), ("noise", ROLL_BACK, NOISE), ("gradient", RECORD, GRADIENT)]
    results = run_faults(store, tiny_model, tmp_path, cases, world=1, prefix="fault")
    assert [result.outcome for result in results] == [Outcome.COMPLETED] * 3
    log = (tmp_path / "rank-0.log").read_text()

    clean = final_loss(store, "fault-clean")
    assert final_loss(store, "fault-noise") == pytest.approx(clean, rel=0.02)
    record = record_of(store, "fault-noise", 2)
    assert record.parent is not None
    (rollback,) = record.rollbacks
    assert (record.parent.run, record.parent.step) == (1, rollback.step)
    assert record.rate_factor == rollback.rate_factor == 0.3
    noticed = rollback.skip_to - SKIPPED_STEPS_AFTER_ALARM
    assert FAULT <= noticed < FAULT + WITHIN
    assert f"notice: step {noticed}: the loss" in log
    rows = {row.step: row for row in step_rows(store, "fault-noise")}
    skipped = [step for step in rows if rollback.skip_from <= step <= rollback.skip_to]
    assert not any(rows[step].applied for step in skipped)
    assert {rows[step].learning_rate for step in range(rollback.step + 1, STEPS + 1)} == {0.3 * RATE_OF_RUNS}
    assert "runs/default/fault-clean/uid-1/runs/000002.json" not in store.keys("runs/default/fault-clean/")

    rows = {row.step: row for row in step_rows(store, "fault-gradient")}
    assert [step for step, row in rows.items() if not row.applied] == [FAULT]
    assert rows[FAULT].gradient_norm is None
    assert rows[FAULT + 1].learning_rate == rows[FAULT - 1].learning_rate
    assert all(row.loss is not None and math.isfinite(row.loss) for step, row in rows.items() if step != FAULT)
    assert final_loss(store, "fault-gradient") == pytest.approx(clean, rel=0.02)
    folder = json.loads(store.read("runs/default/fault-gradient/uid-1/ARTIFACT"))["step"]
    state = json.loads(store.read(f"runs/default/fault-gradient/uid-1/checkpoints/000001-{folder:09d}/trainer.json"))
    assert (state["step"], state["updates"]) == (STEPS, STEPS - 1)
    assert f"{FAULT}: the gradient is not finite (its update was not applied)" in log


@pytest.mark.gang
def test_a_checkpoint_before_the_first_applied_update_is_saved_and_resumed_from(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """The gradient of the first step is infinite, so no update has made AdamW's moments when the checkpoint is saved.
    Two parameter groups have moments that are linked before any update. A job that stops after this step ends as one
    that does not stop."""
    infinite = {"kind": "gradient", "step": 1}
    stops = {"kind": "both", "faults": [infinite, {"kind": "stop", "step": 2}]}
    configs: list[dict[str, Any]] = []
    faults: list[dict[str, Any] | None] = []
    for stage in (0, 1, 2, 3):
        for name, fault in ((f"once-{stage}", infinite), (f"twice-{stage}", stops)):
            config = fault_config(store, name, RECORD, world=1)
            config["optimization"] |= {"zeroStage": stage, "maxSteps": 3, "weightDecay": 0.1}
            config["storage"] |= {"checkpointEverySteps": 1, "keepLast": 3}
            configs.append(config)
            faults.append(fault)
        configs.append(configs[-1])
        faults.append(None)
    results = train_all(
        configs, inputs_of(tiny_model, tmp_path), tmp_path, credentials=store.credentials, faults=faults
    )
    assert [result.outcome for result in results] == [Outcome.COMPLETED, Outcome.STOPPED, Outcome.COMPLETED] * 4

    def files(name: str, run: int, step: int) -> dict[str, bytes]:
        folder = f"runs/default/{name}/uid-1/checkpoints/{run:06d}-{step:09d}/"
        return {key.rpartition("/")[2]: store.read(key) for key in store.keys(folder) if key.endswith(".safetensors")}

    for stage in (0, 1, 2, 3):
        once, twice = (step_rows(store, f"{name}-{stage}") for name in ("once", "twice"))
        assert [row.loss for row in twice] == [row.loss for row in once]
        assert [row.applied for row in once] == [False, True, True]
        first = files(f"once-{stage}", 1, 1)
        assert first == files(f"twice-{stage}", 1, 1)
        state = load(next(iter(first.values())))
        assert not any(state[name].any() for name in state if name.endswith(("/exp_avg", "/exp_avg_sq")))
        assert files(f"once-{stage}", 1, 3) == files(f"twice-{stage}", 2, 3)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_every_fault_ends_within_two_percent_of_the_clean_run(
    world: int, store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    faults = {"noise": NOISE, "drift": DRIFT, "rate": RATE, "gradient": GRADIENT}
    cases = [("clean", ROLL_BACK, None), *((name, ROLL_BACK, fault) for name, fault in faults.items())]
    results = run_faults(store, tiny_model, tmp_path, cases, world=world, prefix=f"all-{world}")
    assert [result.outcome for result in results] == [Outcome.COMPLETED] * 5
    clean = final_loss(store, f"all-{world}-clean")
    for name in faults:
        (rollback,) = record_of(store, f"all-{world}-{name}", 2).rollbacks
        noticed = rollback.skip_to - (0 if name == "gradient" else SKIPPED_STEPS_AFTER_ALARM)
        assert FAULT <= noticed < FAULT + WITHIN, (name, rollback)
        assert final_loss(store, f"all-{world}-{name}") == pytest.approx(clean, rel=0.02), (name, rollback)


@pytest.mark.long
def test_trap_14_an_infinite_gradient_is_left_out_at_every_stage(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    """The step with the infinite gradient changes no weight, so the later losses are the same at every ZeRO stage."""
    configs: list[dict[str, Any]] = []
    faults: list[dict[str, Any] | None] = []
    for stage in (0, 1, 2, 3):
        config = fault_config(store, f"stage-{stage}", RECORD, world=2)
        config["optimization"] |= {"zeroStage": stage, "maxSteps": 8}
        configs.append(config)
        faults.append({"kind": "gradient", "step": 4})
    train_all(configs, inputs_of(tiny_model, tmp_path), tmp_path, credentials=store.credentials, faults=faults)
    losses = [[row.loss for row in step_rows(store, f"stage-{stage}")] for stage in (0, 1, 2, 3)]
    for other in losses[1:]:
        assert other[:3] == pytest.approx(losses[0][:3], rel=1e-6)
        assert other[4:] == pytest.approx(losses[0][4:], rel=1e-6)


@pytest.mark.long
def test_twenty_real_runs_raise_no_alarm(store: ObjectStore, tiny_model: Path, tmp_path: Path) -> None:
    configs = []
    for seed in range(SEEDS):
        config = fault_config(store, f"seed-{seed}", {"onExplodingLoss": "Fail"}, world=1)
        config["optimization"]["seed"] = seed
        configs.append(config)
    results = train_all(configs, inputs_of(tiny_model, tmp_path), tmp_path, credentials=store.credentials)
    assert [result.outcome for result in results] == [Outcome.COMPLETED] * SEEDS


@pytest.mark.long
def test_a_fault_that_comes_back_ends_the_run_after_three_rollbacks(
    store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    lasting = NOISE | {"steps": STEPS}
    (result,) = run_faults(store, tiny_model, tmp_path, [("lasting", ROLL_BACK, lasting)], world=1, prefix="fault")
    assert result.outcome is Outcome.DIVERGED
    assert "and 3 rollbacks did not help" in result.message
    assert record_of(store, "fault-lasting", 4).rate_factor == pytest.approx(0.027)
