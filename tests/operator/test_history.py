"""How the reports of a trainer become progress, curves, checkpoints, scores and notices of the status."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.evaluation import RequirementSpec
from finetune_core.api.status import AttemptsStatus, CurrentAttempt, FineTuneJobStatus, HistoryPoint
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
from finetune_operator.status.conditions import compute_conditions
from finetune_operator.status.events import events_between
from finetune_operator.status.inputs import StatusInput
from finetune_operator.status.report_merge import (
    checkpoints_of,
    evaluation_of,
    merge_history,
    merge_report,
    percentage,
    thin,
)
from tests.operator.builders import NOW


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


def test_a_damaged_checkpoint_is_neither_last_nor_best_and_names_its_object() -> None:
    whole, broken = record(10, 3.0), record(20, 2.0).model_copy(update={"damaged": "state-00001 is missing"})
    found = checkpoints_of([whole, broken])
    assert [item.step for item in found if item.last or item.best] == [10]
    assert found[1].damaged == "state-00001 is missing"


def test_notices_are_kept_once_and_the_newest_last() -> None:
    first = merge_report(FineTuneJobStatus(), report(notices=["3 rows were left out", "passed over"]), NOW)
    again = merge_report(first, report(notices=["passed over"]), NOW)
    assert again.notices == ["3 rows were left out", "passed over"]
    many = merge_report(again, report(notices=[f"notice {number}" for number in range(8)]), NOW)
    assert many.notices == [f"notice {number}" for number in range(8)]


def test_a_store_that_takes_no_checkpoint_becomes_a_condition() -> None:
    """The age of the newest checkpoint is in `progress` (in seconds) and in the condition's message (in minutes)."""
    reported = report(
        checkpoints=[record(20, 2.0)], checkpoint_age_seconds=190, checkpoint_problem="the store answered 503"
    )
    status = merge_report(FineTuneJobStatus(), reported, NOW)
    assert status.progress is not None
    assert status.progress.checkpoint_age_seconds == 190
    attempts = AttemptsStatus(started=1, current=CurrentAttempt(number=1, start_time=NOW))
    given = StatusInput(now=NOW, generation=1, nodes=1, ranks=1, attempts=attempts, report=reported)
    conditions = {condition.type: condition for condition in compute_conditions(FineTuneJobStatus(), status, given)}
    overdue = conditions[ConditionType.CHECKPOINT_AVAILABLE]
    assert (overdue.status, overdue.reason) == ("True", Reason.CHECKPOINT_OVERDUE)
    assert overdue.message == "step 20 is committed; 3 min of training are not saved: the store answered 503"
    before = FineTuneJobStatus()
    after = status.model_copy(update={"conditions": list(conditions.values())})
    recorded = [event for event in events_between(before, after, NOW) if event.reason == Reason.CHECKPOINT_OVERDUE]
    assert [(event.warning, event.note) for event in recorded] == [(True, overdue.message)]
    healthy = StatusInput(now=NOW, generation=1, nodes=1, ranks=1, attempts=attempts, report=report())
    conditions = {condition.type: condition for condition in compute_conditions(FineTuneJobStatus(), status, healthy)}
    assert conditions[ConditionType.CHECKPOINT_AVAILABLE].reason == Reason.COMMITTED


def test_scores_incidents_and_the_named_best_reach_the_status_and_stay() -> None:
    incident = Incident(
        step=12, kind="LossSpike", value="6.1", threshold="2.5", action="RollBack", message="the loss jumped"
    )
    base = ScoreRecord(perplexity=20.0, all_token_perplexity=50.0, task_score=0.05, scores={"exact": 0.05}, graded=40)
    reported = Report(
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
    status = merge_report(FineTuneJobStatus(), reported, NOW)
    # `best` marks the checkpoint that the trainer names, which has the best task score. The perplexity is lowest at
    # another checkpoint.
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
    # A restarted trainer repeats only its own incidents in every report. The status keeps the earlier incidents, and
    # adds each new incident once.
    later = incident.model_copy(update={"step": 30})
    for _ in range(2):
        status = merge_report(status, reported.model_copy(update={"incidents": [later], "evaluation": None}), NOW)
    assert [item.step for item in status.incidents] == [12, 30]
    assert status.evaluation is not None
    assert status.evaluation.base is not None
    assert status.evaluation.base.perplexity == "20"


REQUIRED = [
    RequirementSpec(score="exact", at_least="0.8"),
    RequirementSpec(score="perplexity", better_than_base=True),
]


def test_the_verdict_on_each_required_score_stands_in_the_status() -> None:
    base = ScoreRecord(perplexity=20.0, scores={"exact": 0.05}, graded=40)
    tuned = ScoreRecord(perplexity=1.5, scores={"exact": 0.75}, graded=40)
    before = evaluation_of(EvaluationRecord(rows="Test", examples=40, base=base), REQUIRED)
    assert (before.passed, before.requirements) == (None, [])
    after = evaluation_of(EvaluationRecord(rows="Test", examples=40, base=base, tuned=tuned), REQUIRED)
    assert after.passed is False
    assert [found.to_json() for found in after.requirements] == [
        {"score": "exact", "atLeast": "0.8", "base": "0.05", "tuned": "0.75", "difference": "0.7", "passed": False},
        {
            "score": "perplexity",
            "betterThanBase": True,
            "base": "20",
            "tuned": "1.5",
            "difference": "-18.5",
            "passed": True,
        },
    ]
    assert evaluation_of(EvaluationRecord(rows="Test", examples=40, tuned=tuned)).passed is None


def test_why_answers_were_not_graded_stays_in_the_status_although_the_result_has_no_room_for_it() -> None:
    reasons = {"the row has no text to compare with": 3}
    scored = ScoreRecord(perplexity=2.0, scores={"exact": 1.0}, graded=4, not_graded=3, ungraded=reasons)
    record = EvaluationRecord(rows="Test", examples=7, base=scored, tuned=scored)
    reported = evaluation_of(record)
    final = evaluation_of(record.rounded(), stored=reported)
    assert record.rounded().tuned == scored.model_copy(update={"ungraded": {}})
    assert final == reported
    assert final.tuned is not None
    assert [(group.reason, group.answers) for group in final.tuned.ungraded] == [(*reasons.items(),)[0]]
