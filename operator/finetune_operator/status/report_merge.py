"""Merges what a trainer reports into the status, for example progress, metrics, checkpoints, scores and notices.

Pure functions. `compute.py` calls them with the newest report that the report server received, and at the end of a job
with the trainer's result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from finetune_core.api.evaluation import RequirementSpec
from finetune_core.api.status import (
    CHECKPOINT_LIMIT,
    HISTORY_LIMIT,
    INCIDENT_LIMIT,
    METRIC_LIMIT,
    NOTICE_LIMIT,
    AdapterStatus,
    ArtifactStatus,
    CheckpointStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    HistoryPoint,
    IncidentStatus,
    MetricValue,
    NamedScore,
    PlanStatus,
    ProgressStatus,
    RequirementStatus,
    Scores,
    UngradedAnswers,
)
from finetune_core.contract import (
    AdapterOrigin,
    ArtifactRecord,
    CheckpointName,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
    Phase,
    Report,
    ScoreRecord,
)
from finetune_core.contract.stock_reports import StockReport
from finetune_core.requirements import Judgement, judge
from finetune_operator.observe.committed_checkpoints import committed
from finetune_operator.queue.speed import eta_seconds

PERCENT = 100
"""`totalSteps` in the status of a job whose trainer reports only a percentage, so that one step is one percent."""


def decimal(value: float) -> str:
    """Return ``value`` as text with six significant digits, because the API has no floating-point fields."""
    return f"{value:.6g}"


def _optional(value: float | None) -> str | None:
    return None if value is None else decimal(value)


def merge_report(
    stored: FineTuneJobStatus,
    report: Report,
    received: datetime,
    seconds_per_step: float | None = None,
    *,
    requirements: Sequence[RequirementSpec] = (),
) -> FineTuneJobStatus:
    """Return the status ``stored`` with the content of ``report``, which arrived at ``received``.

    Progress and loss curve of a trainer that still loads its model are ignored, because the stored status knows more.
    ``seconds_per_step`` is the speed that the operator measured; None where no speed is known yet. ``requirements`` is
    `evaluation.require`.
    """
    if isinstance(report, StockReport):
        return _merge_stock_report(stored, report, received, seconds_per_step)
    loading = report.total_steps == 0
    update: dict[str, object] = {}
    if not loading:
        update["progress"] = progress_of(report, received, stored.progress, seconds_per_step)
        update["history"] = merge_history(stored.history, report.history, report.resumed_from_step)
    if report.metrics:
        update["metrics"] = [
            MetricValue(name=name, value=decimal(value), step=report.step)
            for name, value in sorted(report.metrics.items())
        ]
    if report.run > 0 and (report.checkpoints or report.phase is not Phase.LOADING):
        update["checkpoints"] = checkpoints_of(report.checkpoints, report.best)
    if stored.plan is not None:
        update["plan"] = plan_with(stored.plan, report)
    if report.adapter is not None:
        update["adapter"] = adapter_of(stored.adapter, report.adapter)
    if report.notices:
        update["notices"] = merge_notices(stored.notices, report.notices)
    if report.evaluation is not None:
        # The verdict on the job waits for the artifact: a job whose export fails has not passed.
        verdict = stored.evaluation.passed if stored.evaluation is not None else None
        update["evaluation"] = evaluation_of(report.evaluation, requirements).model_copy(update={"passed": verdict})
    if report.incidents:
        update["incidents"] = merge_incidents(stored.incidents, report.incidents)
    return stored.model_copy(update=update)


def plan_with(plan: PlanStatus, report: Report) -> PlanStatus:
    """Return ``plan`` with what ``report`` says of the model: its attention kernel, and the share of its weights that
    the LoRA adapters can change."""
    told: dict[str, object] = {"attention": report.attention} if report.attention else {}
    if report.adapted_share is not None:
        told["adapted_share"] = decimal(report.adapted_share)
    return plan.model_copy(update=told)


def adapter_of(stored: AdapterStatus | None, told: AdapterOrigin) -> AdapterStatus:
    """Return `status.adapter` with what the trainer has told of the adapter. Where the operator has recorded the
    artifact of another job, only the digest of the files is taken, because every attempt starts from the record."""
    if stored is not None and stored.job_uid:
        return stored.model_copy(update={"sha256": told.sha256})
    return AdapterStatus(use=told.use, source=told.source, revision=told.revision or "", sha256=told.sha256)


def merge_notices(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return old and new notices, the newest last. Each notice is kept once, because a report repeats earlier notices.

    Where there are more than NOTICE_LIMIT notices, the oldest notices are dropped.
    """
    return [*(sentence for sentence in old if sentence not in new), *dict.fromkeys(new)][-NOTICE_LIMIT:]


def _merge_stock_report(
    stored: FineTuneJobStatus, report: StockReport, received: datetime, seconds_per_step: float | None
) -> FineTuneJobStatus:
    """Return ``stored`` with a report in Kubeflow's protocol; values that the report lacks stay as they are."""
    old = stored.progress
    step, total = _position(report, old)
    done = report.reported_percentage == 100
    progress = ProgressStatus(
        step=step,
        total_steps=total,
        epoch=decimal(report.epoch) if report.epoch or old is None else old.epoch,
        percentage=100 if done else percentage(step, total),
        eta_seconds=0 if done else eta_seconds(step, total, seconds_per_step, old),
        last_update_time=received,
    )
    metrics = {metric.name: metric for metric in stored.metrics}
    for name, value in report.metrics.items():
        text = decimal(value)
        if name not in metrics or metrics[name].value != text:
            metrics[name] = MetricValue(name=name, value=text, step=step)
    loss = metrics.get("loss")
    points = [] if loss is None else [HistoryPoint(step=loss.step, loss=loss.value)]
    history = {point.step: point for point in [*stored.history, *points] if point.step <= step}
    return stored.model_copy(
        update={
            "progress": progress,
            "metrics": [metrics[name] for name in sorted(metrics)][:METRIC_LIMIT],
            "history": thin([history[number] for number in sorted(history)], HISTORY_LIMIT),
        }
    )


def _position(report: StockReport, old: ProgressStatus | None) -> tuple[int, int]:
    """Return the current step and the total number of steps of the training.

    Where the client has reported only percentages so far, the percentage is returned as a step out of 100. Where this
    report has no step but an earlier report had a step, the stored step is returned: transformers reports 0 % at its
    start, even after a resume, and no step at its end.
    """
    step, total = report.reported_step, report.reported_total
    if step is None and total is None and (old is None or old.total_steps == PERCENT):
        return report.reported_percentage or 0, PERCENT
    known = old.step if old else 0
    return known if step is None else step, total or (old.total_steps if old else PERCENT)


def progress_of(
    report: Report, received: datetime, stored: ProgressStatus | None, seconds_per_step: float | None
) -> ProgressStatus:
    """Return `status.progress` for ``report``. The trainer's estimate of the remaining time is used only where the
    operator has no speed of its own."""
    eta = eta_seconds(report.step, report.total_steps, seconds_per_step, stored)
    return ProgressStatus(
        step=report.step,
        total_steps=report.total_steps,
        epoch=decimal(report.epoch),
        percentage=percentage(report.step, report.total_steps),
        eta_seconds=report.eta_seconds if eta is None else eta,
        tokens_per_second=_optional(report.tokens_per_second),
        checkpoint_age_seconds=report.checkpoint_age_seconds,
        mfu=_optional(report.mfu),
        last_update_time=received,
    )


def percentage(step: int, total: int) -> int:
    """Return ``step`` / ``total`` in percent, rounded down, so that 100 means that every step is done."""
    return min(100, 100 * step // total) if total else 0


def merge_history(old: Sequence[HistoryPoint], new: Iterable[CurvePoint], resumed_from_step: int) -> list[HistoryPoint]:
    """Return the loss curve: the ``old`` points up to the step ``resumed_from_step``, then the later ``new`` points.

    Old points after that step are dropped, because the run resumed from that step and trains the later steps again.
    Where no old point is kept, all new points are taken.
    """
    kept = [point for point in old if point.step <= resumed_from_step]
    reported = [
        HistoryPoint(step=point.step, loss=_optional(point.loss), perplexity=_optional(point.perplexity))
        for point in new
        if point.step > resumed_from_step or not kept
    ]
    merged = {point.step: point for point in [*kept, *reported]}
    return thin([merged[step] for step in sorted(merged)], HISTORY_LIMIT)


def thin(points: Sequence[HistoryPoint], limit: int) -> list[HistoryPoint]:
    """Return at most ``limit`` points of the curve, always with its first and last point.

    The point whose neighbours are closest to each other is dropped first. Points with a perplexity are dropped last,
    because they are rarer than points with only a loss.
    """
    result = list(points)
    while len(result) > limit:
        inner = range(1, len(result) - 1)
        densest = min(
            inner, key=lambda i: (result[i].perplexity is not None, result[i + 1].step - result[i - 1].step, i)
        )
        del result[densest]
    return result


def evaluation_of(
    record: EvaluationRecord, requirements: Sequence[RequirementSpec] = (), *, stored: EvaluationStatus | None = None
) -> EvaluationStatus:
    """Return `status.evaluation` for ``record``: the scores of the base model and of the tuned model, and whether the
    tuned model reached ``requirements``.

    ``record`` may have no room for the reasons why answers could not be graded. The reasons in ``stored``, the stored
    `status.evaluation`, are then kept if ``stored`` has the same number of answers that could not be graded.
    """
    judgements = judge(requirements, record) if record.tuned is not None else []
    return EvaluationStatus(
        rows=record.rows,
        examples=record.examples,
        base=_scores(record.base, stored.base if stored is not None else None),
        tuned=_scores(record.tuned, stored.tuned if stored is not None else None),
        tuned_step=record.tuned_step,
        passed=all(judgement.passed for judgement in judgements) if judgements else None,
        requirements=[_requirement(judgement) for judgement in judgements],
    )


def _requirement(judgement: Judgement) -> RequirementStatus:
    requirement = judgement.requirement
    return RequirementStatus(
        score=requirement.score,
        at_least=requirement.at_least,
        at_most=requirement.at_most,
        better_than_base=requirement.better_than_base,
        base=_optional(judgement.base),
        tuned=_optional(judgement.tuned),
        difference=_optional(judgement.difference),
        passed=judgement.passed,
    )


def _scores(record: ScoreRecord | None, stored: Scores | None) -> Scores | None:
    if record is None:
        return None
    reasons = [UngradedAnswers(reason=reason, answers=count) for reason, count in record.ungraded.items()]
    if not reasons and stored is not None and stored.not_graded == record.not_graded:
        reasons = stored.ungraded
    return Scores(
        perplexity=decimal(record.perplexity),
        all_token_perplexity=_optional(record.all_token_perplexity),
        task_score=_optional(record.task_score),
        scores=[NamedScore(name=name, value=decimal(value)) for name, value in record.scores.items()],
        graded=record.graded,
        not_graded=record.not_graded,
        ungraded=reasons,
    )


def merge_incidents(old: Sequence[IncidentStatus], new: Iterable[Incident]) -> list[IncidentStatus]:
    """Return ``old`` and ``new`` incidents, each once; the oldest are dropped above INCIDENT_LIMIT.

    Old incidents are kept, because a restarted trainer does not know them.
    """
    reported = [IncidentStatus(**incident.model_dump()) for incident in new]
    return [*(incident for incident in old if incident not in reported), *reported][-INCIDENT_LIMIT:]


def checkpoints_of(records: Sequence[CheckpointRecord], named: CheckpointName | None = None) -> list[CheckpointStatus]:
    """Return `status.checkpoints`. Of the undamaged checkpoints, the newest is marked `last` and the best `best`.

    ``named`` is the checkpoint that the trainer reports as the best. Where the trainer reports no best checkpoint, the
    checkpoint with the lowest perplexity counts as the best.
    """
    records = records[-CHECKPOINT_LIMIT:]
    whole = [record for record in records if not record.damaged]
    scored = [record for record in whole if record.perplexity is not None]
    if named is not None:
        scored = [record for record in whole if (record.run, record.step) == (named.run, named.step)]
    best = min(scored, key=lambda record: record.perplexity or 0.0) if scored else None
    return [
        committed(record).model_copy(
            update={
                "perplexity": _optional(record.perplexity),
                "task_score": _optional(record.task_score),
                "last": bool(whole) and record is whole[-1],
                "best": record is best,
            }
        )
        for record in records
    ]


def artifact_of(record: ArtifactRecord) -> ArtifactStatus:
    """Return `status.artifact` for the committed artifact that the trainer's result names."""
    return ArtifactStatus(uri=record.uri, step=record.step, bytes=record.bytes, manifest_sha256=record.manifest_sha256)
