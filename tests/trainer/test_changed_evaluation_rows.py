"""Scores are compared on the same rows only. Validation rows may change while a job runs: between two attempts, or
between the reads of two nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.preparation import PreparationSummary, agreed_summary
from tests.trainer import tiny
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

pytestmark = pytest.mark.gang

BEFORE_FIRST, AFTER_FIRST = {"kind": "stop", "step": 1}, {"kind": "stop", "step": 3}


@pytest.fixture(scope="module")
def runs(
    store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Result, str]]:
    """Train jobs, and return the result and the log of the last attempt of each, by the job's name.

    The job `never` is not stopped. The other jobs are stopped and resumed: `begun` and `trained` then get other
    validation rows, `regraded` gets other right answers for its rows, and `same` gets the same rows again.
    """
    folder = tmp_path_factory.mktemp("changed-rows")
    rows = tiny.rows(7, seed=2)
    older = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(folder / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(folder / "older.jsonl", [row | {"gold": row["reply"]} for row in rows]),
    )
    other = tiny.write_jsonl(folder / "other.jsonl", [row | {"gold": row["reply"]} for row in tiny.rows(5, seed=3)])
    gold = tiny.write_jsonl(folder / "gold.jsonl", [row | {"gold": row["question"]} for row in rows])
    first: list[tuple[str, Inputs, Mapping[str, Any] | None]] = [
        ("never", older.model_copy(update={"validation": other}), None),
        ("begun", older, BEFORE_FIRST),
        ("trained", older, AFTER_FIRST),
        ("same", older, AFTER_FIRST),
        ("regraded", older, AFTER_FIRST),
    ]
    second = [
        ("begun", older.model_copy(update={"validation": other}), None),
        ("trained", older.model_copy(update={"validation": other}), None),
        ("same", older, None),
        ("regraded", older.model_copy(update={"validation": gold}), None),
    ]
    configs = {
        name: run_config(
            store,
            f"rows-{name}",
            world__nodes=1,
            method="Full",
            dataset__task={"name": "ExactMatch", "fields": {"answer": "gold"}},
            evaluation__generation={"maxNewTokens": 4, "batchSize": 8},
            evaluation__require=[{"score": "perplexity", "betterThanBase": True}],
        )
        for name, _, _ in first
    }
    results = train_all(
        [configs[name] for name, _, _ in [*first, *second]],
        [inputs for _, inputs, _ in [*first, *second]],
        folder / "runs",
        credentials=store.credentials,
        seconds=60,
        faults=[dict(fault) if fault else None for _, _, fault in [*first, *second]],
    )
    logs = (folder / "runs" / "rank-0.log").read_text().split("dataset.train: ")[1:]
    names = [name for name, _, _ in [*first, *second]]
    assert len(logs) == len(names)
    return {name: (result, log) for name, result, log in zip(names, results, logs, strict=True)}


def test_the_base_model_is_scored_again_on_rows_that_changed_before_the_first_checkpoint(
    runs: dict[str, tuple[Result, str]],
) -> None:
    begun, never = runs["begun"][0], runs["never"][0]
    assert begun.outcome is Outcome.COMPLETED
    assert (begun.outcome, begun.evaluation) == (never.outcome, never.evaluation)


@pytest.mark.parametrize("job", ["trained", "regraded"])
def test_no_score_on_other_rows_is_taken_for_that_of_the_base_model(
    job: str, runs: dict[str, tuple[Result, str]]
) -> None:
    """Rows also change where only the column with their right answers does."""
    result, log = runs[job]
    assert result.outcome is Outcome.GATE_FAILED
    assert "must be better than the base model's, which was not measured" in result.message
    assert result.evaluation is not None
    assert (result.evaluation.base, result.evaluation.examples) == (None, {"trained": 5, "regraded": 7}[job])
    assert "the base model's score on these validation rows is not in the bucket" in log
    assert "notice: the validation rows are not those that the checkpoint was made with" in log


def test_with_the_same_rows_the_score_of_the_base_model_is_taken_and_nothing_is_said(
    runs: dict[str, tuple[Result, str]],
) -> None:
    result, log = runs["same"]
    assert result.outcome is Outcome.COMPLETED
    assert result.evaluation is not None
    assert result.evaluation.base is not None
    assert "validation rows are not" not in log
    assert "not in the bucket" not in log


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_nodes_that_read_different_rows_of_any_set_do_not_train(name: str) -> None:
    def node(**changed: str) -> dict[str, Any]:
        sets = {"train": "a", "validation": "b", "test": "c"} | changed
        train = sets.pop("train")
        made = PreparationSummary(notices=[], context=8, data_sha256=train, evaluation_sha256=sets, model_context=8)
        return made.model_dump(mode="json")

    agreed = agreed_summary([node(), None, node()])
    assert agreed == PreparationSummary.model_validate(node())
    with pytest.raises(UserError, match=rf"^dataset\.{name}: the nodes of this job read different rows") as found:
        agreed_summary([node(), None, node(**{name: "other"})])
    assert found.value.subject == f"dataset.{name}"
