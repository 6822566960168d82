"""A job that is told to stop at an evaluation, or is killed there, ends as the same job does without a stop.

The stop comes during an evaluation, right behind one, or in the export. The best checkpoint, the early end, the verdict
of `evaluation.require` and the bits of the artifact must not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune_core.contract import Outcome, Result, RunConfig
from finetune_core.requirements import judged
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.artifact import committed_result
from tests.trainer import tiny
from tests.trainer.faults import LATER_POINTS
from tests.trainer.gangs import run_plans, step_rows, train_all, write_plans
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.test_kills import KILLED
from tests.trainer.test_recovery import artifact_files, root_of

pytestmark = pytest.mark.gang

UNREACHED = 100.0
"""`evaluation.minDelta` that no evaluation reaches."""
EVALUATED = 4
"""The stop `during` comes in the evaluation after this step, and the stop `behind` right after that evaluation. The
perplexity after this step is the lowest, but it is no improvement: with `minDelta` it falls by too little, and with
TaskScore all scores are equal."""
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
REQUIRED = [{"score": "perplexity", "betterThanBase": True}, {"score": "exact", "atLeast": "1"}]


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


def config_of(store: ObjectStore, name: str, job: str) -> dict[str, Any]:
    """Return the run file of the job ``name`` with the settings of ``job``, an entry of JOBS."""
    return run_config(
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
        evaluation__require=REQUIRED,
        **JOBS[job],
    )


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("rows")
    return Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "validation.jsonl", tiny.rows(7, seed=2)),
    )


@pytest.fixture(scope="module")
def ended(store: ObjectStore, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Train each job without a stop, and with each stop. Return how the jobs ended, by their names."""
    folder = tmp_path_factory.mktemp("stops")
    names: list[str] = []
    configs: list[dict[str, Any]] = []
    faults: list[dict[str, Any] | None] = []
    for job in JOBS:
        for stop, fault in {"whole": None, **STOPS}.items():
            for own in [None] if fault is None else [dict(fault), None]:
                names.append(f"{job}-{stop}")
                configs.append(config_of(store, names[-1], job))
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


def test_a_job_that_is_killed_in_an_evaluation_and_in_the_export_ends_like_one_that_is_not(
    store: ObjectStore, inputs: Inputs, ended: dict[str, Ended], tmp_path: Path
) -> None:
    config = config_of(store, "killed-late", "min-delta")
    # The scores of the base model take the first two evaluations of rows, and step 2 takes the third. So the first
    # attempt is killed in the evaluation after step 4.
    points = {"evaluation": 4, "artifact": 1, "published": 1}
    assert tuple(points) == LATER_POINTS
    for attempt, (point, count) in enumerate(points.items(), start=1):
        fault = {"kind": "kill", "rank": 0, "point": point, "count": count}
        folder = tmp_path / point
        plans = write_plans([config], inputs, folder, credentials=store.credentials, faults=[fault], attempt=attempt)
        assert run_plans(plans, folder) == [KILLED], (folder / "rank-0.log").read_text()
    # The launcher of the next attempt finds the artifact, and judges its scores again.
    found = committed_result(root_of(store, "killed-late"))
    assert found is not None
    whole = ended["min-delta-whole"]
    killed = end_of(store, "killed-late", judged(found, RunConfig.model_validate(config).evaluation.require))
    assert killed._replace(message=whole.message) == whole
    (result,) = train_all([config], inputs, tmp_path / "again", credentials=store.credentials)
    assert end_of(store, "killed-late", result)._replace(message=whole.message) == whole


def test_the_jobs_are_those_in_which_a_stop_could_change_the_end(ended: dict[str, Ended]) -> None:
    for job in ("min-delta", "equal-scores"):
        whole = ended[f"{job}-whole"]
        assert whole.outcome is Outcome.GATE_FAILED
        assert whole.step == EVALUATED
        assert min(whole.evaluations, key=lambda step: whole.evaluations[step]) == EVALUATED
    assert set(ended["patience-whole"].evaluations) == {2, 4, 6, 8}, "it ends early"
