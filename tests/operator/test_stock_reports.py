"""Tests of stock reports, in the protocol of Kubeflow Trainer's runtime status.

The tests show which reports are rejected, and how the operator handles the reports of the client in transformers. Some
values of this client are wrong, such as 0 % at the beginning of a resumed run. `BEGIN`, `END` and the results of `step`
are bodies such as transformers 5.23 sends. Most of the rejected bodies are made up. `test_stock_trainer.py` runs the
real client.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.contract.stock_reports import RuntimeStatus, to_report
from finetune_operator.status.report_merge import merge_report
from tests.operator.builders import NOW

BEGIN: dict[str, Any] = {"progressPercentage": 0, "metrics": [{"name": "total_steps", "value": "200"}]}
LOSS = {"name": "loss", "value": "1.25"}


def step(number: int, **metrics: float) -> dict[str, Any]:
    """Return the body of the report that transformers sends after step ``number``."""
    reported = {**metrics, "current_step": number, "total_steps": 200, "current_epoch": number / 100}
    values = [{"name": name, "value": str(value)} for name, value in reported.items()]
    return {"progressPercentage": number // 2, "estimatedRemainingSeconds": 7, "metrics": values}


END: dict[str, Any] = {"progressPercentage": 100, "estimatedRemainingSeconds": 0, "metrics": [LOSS]}


def merged(*bodies: dict[str, Any], seconds_per_step: float | None = 3.0) -> FineTuneJobStatus:
    """Return the status that results when stock reports with the fields ``bodies`` are merged, one after another.
    ``seconds_per_step`` is the speed that the operator has measured, or None if it has measured no speed yet."""
    status = FineTuneJobStatus()
    for body in bodies:
        text = json.dumps({"trainerStatus": {"lastUpdatedTime": NOW.isoformat()} | body})
        report = to_report(RuntimeStatus.model_validate_json(text), "pod-0", 4)
        assert report.ranks == 4
        status = merge_report(status, report, NOW, seconds_per_step)
    return status


def test_a_step_becomes_progress_with_our_own_remaining_time() -> None:
    progress = merged(step(50)).progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.percentage) == (50, 200, 25)
    assert progress.eta_seconds == 450, "the client's 7 s count the steps of earlier runs"
    assert progress.epoch == "0.5"


def test_zero_percent_at_the_beginning_of_a_resumed_run_is_not_shown() -> None:
    progress = merged(step(150), BEGIN).progress
    assert progress is not None
    assert (progress.step, progress.percentage, progress.epoch) == (150, 75, "1.5")


def test_a_run_that_begins_anew_shows_its_steps() -> None:
    progress = merged(step(150), BEGIN, step(1)).progress
    assert progress is not None
    assert (progress.step, progress.percentage) == (1, 0)


def test_metrics_that_are_not_repeated_stay() -> None:
    status = merged(step(10, loss=2.5, grad_norm=1.5, learning_rate=1e-4), step(20, eval_loss=2.0), BEGIN)
    values = {metric.name: (metric.value, metric.step) for metric in status.metrics}
    assert values == {
        "loss": ("2.5", 10),
        "gradientNorm": ("1.5", 10),
        "learningRate": ("0.0001", 10),
        "evaluationLoss": ("2", 20),
    }


def test_the_curve_has_a_point_for_every_new_loss_and_forgets_what_a_resume_lost() -> None:
    status = merged(step(10, loss=3.0), step(12, loss=3.0), step(20, loss=2.0), step(30, loss=1.5), step(15, loss=2.5))
    assert [(point.step, point.loss) for point in status.history] == [(10, "3"), (15, "2.5")]


def test_the_end_is_a_hundred_percent_at_the_last_reported_step() -> None:
    progress = merged(step(190), END).progress
    assert progress is not None
    assert (progress.step, progress.percentage, progress.eta_seconds) == (190, 100, 0)


def test_a_client_without_steps_is_taken_at_its_percentage() -> None:
    progress = merged({"progressPercentage": 30}, {"progressPercentage": 40}).progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.percentage) == (40, 100, 40)


def test_a_metric_that_is_no_number_is_passed_over() -> None:
    assert merged(step(1) | {"metrics": [{"name": "note", "value": "warm"}, LOSS]}).metrics[0].name == "loss"


@pytest.mark.parametrize(
    "body",
    [
        {"progressPercentage": 101},
        {"progressPercentage": "50"},
        {"progressPercentage": 1.5},
        {"metrics": [{"name": "loss", "value": "nan"}]},
        {"metrics": [{"name": "loss", "value": "-inf"}]},
        {"metrics": [{"name": "current_step", "value": "1.5"}]},
        {"metrics": [{"name": "current_step", "value": "-1"}]},
        {"metrics": [{"name": "x" * 65, "value": "1"}]},
        {"metrics": [{"name": "x", "value": "1"}] * 257},
        {"lastUpdatedTime": "yesterday"},
    ],
)
def test_malformed_reports_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ValueError)):
        merged(body)
