"""A whole job with the plain engine ends as with DeepSpeed's: the same losses, scores, checkpoints and artifact, also
where it stops in the middle and goes on with the other engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.gangs import losses_of, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_stops_at_evaluations import Ended, end_of

pytestmark = pytest.mark.gang

STEPS = 6
STOPPED_AT = 4
ATTEMPTS: Mapping[str, list[int | None]] = {
    "deepspeed": [2],
    "plain": [None],
    "plain-first": [None, 2],
    "plain-second": [2, None],
}
"""The ZeRO stages of the attempts of a job, by its name; None for the plain engine. A first attempt of two stops."""
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"method": "LoRA", "optimization__precision": "fp32"},
    "full": {"method": "Full", "optimization__precision": "bf16", "optimization__weightDecay": 0.1},
}


@pytest.fixture(scope="module")
def ended(
    store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[float], Ended]]:
    """Train all jobs in one process. Return the losses of their steps, and how they ended."""
    folder = tmp_path_factory.mktemp("engines")
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2)),
    )
    names, configs, faults = list[str](), list[dict[str, Any]](), list[dict[str, Any] | None]()
    for (kind, options), (engines, attempts) in itertools.product(KINDS.items(), ATTEMPTS.items()):
        for number, stage in enumerate(attempts, start=1):
            names.append(f"{kind}-{engines}")
            configs.append(
                run_config(
                    store,
                    f"{kind}-{engines}",
                    world__nodes=1,
                    dataset__task={"name": "ExactMatch"},
                    optimization__zeroStage=stage,
                    optimization__maxSteps=STEPS,
                    evaluation__everySteps=3,
                    evaluation__artifactFrom="Best",
                    evaluation__generation={"maxNewTokens": 4, "batchSize": 8},
                    **options,
                )
            )
            faults.append({"kind": "stop", "step": STOPPED_AT} if number < len(attempts) else None)
    results = train_all(configs, inputs, folder / "runs", credentials=store.credentials, faults=faults)
    return {
        name: (losses_of(store, name), end_of(store, name, result)) for name, result in zip(names, results, strict=True)
    }


@pytest.mark.parametrize("engines", [name for name in ATTEMPTS if name != "deepspeed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_with_the_plain_engine_ends_as_with_that_of_deepspeed(
    kind: str, engines: str, ended: dict[str, tuple[list[float], Ended]]
) -> None:
    losses, found = ended[f"{kind}-{engines}"]
    wanted_losses, wanted = ended[f"{kind}-deepspeed"]
    assert wanted.outcome is Outcome.COMPLETED
    assert len(wanted_losses) == STEPS
    assert list(wanted.evaluations) == [3, 6]
    assert losses == wanted_losses
    assert found._replace(files={}) == wanted._replace(files={})
    assert set(found.files) == set(wanted.files)
    assert [name for name, content in found.files.items() if content != wanted.files[name]] == []
