"""How reports become progress, curves and checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

from finetune_core.api.status import FineTuneJobStatus, HistoryPoint
from finetune_core.contract import (
    CheckpointName,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
    Phase,
    Report,
    ScoreRecord,
)
from finetune_operator.history import checkpoints_of, merge_history, merge_report, percentage, thin
from tests.operator.worlds import NOW


def points(*steps: int) -> list[HistoryPoint]:
    return [HistoryPoint(step=step, loss="1") for step in steps]


def curve(*steps: int) -> list[CurvePoint]:
    return [CurvePoint(step=step, loss=2.0) for step in steps]


def test_a_resumed_run_replaces_what_was_lost() -> None:
    merged = merge_history(points(10, 20, 30, 40), curve(21, 31), resumed_from_step=20)
    assert [(point.step, point.loss) for point in merged] == [(10, "1"), (20, "1"), (21, "2"), (31, "2")]


def test_the_same_report_twice_changes_nothing() -> None:
    once = merge_history(points(10, 20, 30), curve(21, 31), resumed_from_step=20)
    assert merge_history(once, curve(21, 31), resumed_from_step=20) == once


def test_a_run_from_the_beginning_forgets_the_old_curve() -> None:
    assert [point.step for point in merge_history(points(10, 20), curve(1, 2), resumed_from_step=0)] == [1, 2]


def test_thinning_keeps_ends_and_perplexities() -> None:
    many = [HistoryPoint(step=step, loss="1", perplexity="3" if step % 25 == 0 else None) for step in range(1, 121)]
    kept = thin(many, 60)
    assert len(kept) == 60
    assert (kept[0].step, kept[-1].step) == (1, 120)
    assert {25, 50, 75, 100} <= {point.step for point in kept}
    gaps = [b.step - a.step for a, b in pairwise(kept)]
    assert max(gaps) <= 4


def report(**changes: object) -> Report:
    values: dict[str, object] = {
        "run": 1,
        "pod_uid": "pod-0",
        "phase": Phase.TRAINING,
        "ranks": 2,
        "step": 50,
        "total_steps": 150,
        "epoch": 0.5,
        "metrics": {"loss": 0.123456789, "learningRate": 1e-4},
        "history": curve(50),
        "checkpoints": [],
    }
    return Report.model_validate(values | changes)


def test_numbers_become_decimal_strings() -> None:
    status = merge_report(FineTuneJobStatus(), report(), NOW)
    assert status.progress is not None
    assert (status.progress.percentage, status.progress.epoch) == (33, "0.5")
    assert {metric.name: metric.value for metric in status.metrics} == {"learningRate": "0.0001", "loss": "0.123457"}


def test_a_trainer_that_still_loads_erases_nothing() -> None:
    status = merge_report(FineTuneJobStatus(), report(checkpoints=[record(20, 5.0)]), NOW)
    loading = report(run=0, phase=Phase.LOADING, step=0, total_steps=0, metrics={}, history=[])
    assert merge_report(status, loading, NOW + timedelta(seconds=60)) == status


def record(step: int, perplexity: float | None) -> CheckpointRecord:
    time = datetime(2026, 11, 24, 13, 0, 0, 123456, tzinfo=timezone(timedelta(hours=1)))
    return CheckpointRecord(
        run=1, step=step, uri="s3://b/c", bytes=1, manifest_sha256="a", perplexity=perplexity, time=time
    )


def test_the_newest_and_the_best_checkpoint_are_marked() -> None:
    found = checkpoints_of([record(10, 3.0), record(20, 2.0), record(30, 2.5), record(40, None)])
    assert [item.step for item in found if item.last] == [40]
    assert [item.step for item in found if item.best] == [20]
    assert found[0].time == datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def test_percentages_are_rounded_down() -> None:
    assert [percentage(step, 150) for step in (0, 1, 149, 150, 151)] == [0, 0, 99, 100, 100]
    assert percentage(0, 0) == 0


def test_scores_incidents_and_the_named_best_reach_the_status_and_stay() -> None:
    incident = Incident(
        step=12, kind="LossSpike", value="6.1", threshold="2.5", action="RollBack", message="the loss jumped"
    )
    base = ScoreRecord(perplexity=20.0, all_token_perplexity=50.0, task_score=0.05, scores={"exact": 0.05}, graded=40)
    told = Report(
        run=1,
        pod_uid="p",
        phase=Phase.TRAINING,
        ranks=1,
        step=12,
        total_steps=20,
        epoch=1.0,
        metrics={},
        history=[],
        checkpoints=[
            CheckpointRecord(
                run=1,
                step=step,
                uri="s3://b/c",
                bytes=1,
                manifest_sha256="0",
                perplexity=value,
                task_score=share,
                time=NOW,
            )
            for step, value, share in ((5, 2.0, 0.5), (10, 3.0, 0.75))
        ],
        best=CheckpointName(run=1, step=10),
        incidents=[incident],
        evaluation=EvaluationRecord(rows="Test", examples=44, base=base),
        mfu=0.4321,
    )
    status = merge_report(FineTuneJobStatus(), told, NOW)
    # The least perplexity is not the best where the task's score decides.
    assert [(record.step, record.best, record.task_score) for record in status.checkpoints] == [
        (5, False, "0.5"),
        (10, True, "0.75"),
    ]
    assert status.evaluation is not None
    assert status.evaluation.base is not None
    assert (status.evaluation.rows, status.evaluation.examples, status.evaluation.base.graded) == ("Test", 44, 40)
    assert [(score.name, score.value) for score in status.evaluation.base.scores] == [("exact", "0.05")]
    assert status.evaluation.tuned is None
    assert status.progress is not None
    assert status.progress.mfu == "0.4321"
    # A trainer that was started again knows only its own incidents, and repeats them with every report.
    later = incident.model_copy(update={"step": 30})
    for _ in range(2):
        status = merge_report(status, told.model_copy(update={"incidents": [later], "evaluation": None}), NOW)
    assert [item.step for item in status.incidents] == [12, 30]
    assert status.evaluation.base.perplexity == "20"
