"""A job that is told to stop at an evaluation ends as the same job does without a stop.

The stop comes during an evaluation, right behind one, or in the export. The best checkpoint, the early end, the verdict
of `evaluation.require` and the bits of the artifact must not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune_core.contract import Outcome, Result
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_recovery import artifact_files

UNREACHED = 100.0
"""`evaluation.minDelta` that no evaluation reaches."""
EVALUATED = 4
"""The step at whose evaluation the jobs are stopped. The perplexity after this step is the lowest, but no improvement:
with `minDelta` it falls by too little, and with TaskScore all scores are equal."""
JOBS: Mapping[str, Mapping[str, Any]] = {
    "min-delta": {"evaluation__minDelta": UNREACHED, "storage__checkpointEverySteps": 2},
    "equal-scores": {"evaluation__bestBy": "TaskScore", "storage__checkpointEverySteps": 2},
    "patience": {
        "evaluation__minDelta": UNREACHED,
        "evaluation__patience": 3,
        "storage__checkpointEverySteps": 100,
    },
}
STOPS: Mapping[str, Mapping[str, Any]] = {
    "during": {"kind": "told", "step": EVALUATED, "rank": 0},
    "behind": {"kind": "stop", "step": EVALUATED + 1},
    "export": {"kind": "phase", "phase": "Exporting"},
}


class Ended(NamedTuple):
    """How a job ended."""

    outcome: Outcome
    message: str
    step: int
    """The step of the artifact."""
    evaluations: Mapping[int, tuple[float | None, float | None]]
    """Perplexity and task score of the evaluated steps."""
    scores: Any
    files: Mapping[str, bytes]


@pytest.fixture(scope="module")
def ended(store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Train each job without a stop, and with each stop. Return how the jobs ended, by their names."""
    folder = tmp_path_factory.mktemp("stops")
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2)),
    )
    names: list[str] = []
    configs: list[dict[str, Any]] = []
    faults: list[dict[str, Any] | None] = []
    for job, changes in JOBS.items():
        for stop, fault in {"whole": None, **STOPS}.items():
            name = f"{job}-{stop}"
            config = run_config(
                store,
                name,
                world__nodes=1,
                method="Full",
                dataset__task={"name": "ExactMatch"},
                optimization__maxSteps=10,
                optimization__learningRate=6e-3,
                evaluation__everySteps=2,
                evaluation__artifactFrom="Best",
                evaluation__generation={"maxNewTokens": 4, "batchSize": 8},
                evaluation__require=[
                    {"score": "perplexity", "betterThanBase": True},
                    {"score": "exact", "atLeast": "1"},
                ],
                **changes,
            )
            for own in [None] if fault is None else [dict(fault), None]:
                names.append(name)
                configs.append(config)
                faults.append(own)
    results = train_all(configs, inputs, folder / "runs", credentials=store.credentials, faults=faults)
    stopped = [result.outcome for result, fault in zip(results, faults, strict=True) if fault is not None]
    assert stopped == [Outcome.STOPPED] * len(stopped)
    return {name: end_of(store, name, result) for name, result in zip(names, results, strict=True)}


def end_of(store: ObjectStore, name: str, result: Result) -> Ended:
    rows = [row for row in step_rows(store, name) if row.perplexity is not None]
    step = result.artifact.step if result.artifact is not None else 0
    evaluations = {row.step: (row.perplexity, row.task_score) for row in rows}
    files = artifact_files(store, name) if result.artifact is not None else {}
    return Ended(result.outcome, result.message, step, evaluations, result.evaluation, files)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_stopped_at_an_evaluation_ends_like_one_that_is_not(
    job: str, stop: str, ended: dict[str, Ended]
) -> None:
    assert ended[f"{job}-{stop}"] == ended[f"{job}-whole"]


def test_the_jobs_are_those_in_which_a_stop_could_change_the_end(ended: dict[str, Ended]) -> None:
    for job in ("min-delta", "equal-scores"):
        whole = ended[f"{job}-whole"]
        assert whole.outcome is Outcome.GATE_FAILED
        assert whole.step == EVALUATED
        assert min(whole.evaluations, key=lambda step: whole.evaluations[step]) == EVALUATED
    assert set(ended["patience-whole"].evaluations) == {2, 4, 6, 8}, "it ends early"
