"""Functions that describe a FineTuneJob in words for people. The conditions of the job give its state, a message, what
stops the job from going on, and how the job ended. Its metrics, scores and requirements come from other status fields.

All functions are pure. `panel.py`, `log_lines.py`, the commands and the demo call these functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_cli.formatting import measured
from finetune_core.api.conditions import Condition, ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import EvaluationStatus, FineTuneJobStatus, MetricValue, RequirementStatus, Scores
from finetune_core.task_declaration import ALL_TOKENS_LABEL, ALL_TOKENS_MEANING
from finetune_core.tasks import main_score_label

NOT_SEEN = "Pending"
"""State of a job whose status is empty."""
NOT_SEEN_MESSAGE = "no operator has looked at it yet; `kubectl get pods -A -l app.kubernetes.io/name=finetune-operator`"
"""Message about a job whose status is empty."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: whether the job succeeded, and the reason and message of the condition `Succeeded`."""

    succeeded: bool
    reason: str
    message: str


def status_of(job: FineTuneJob) -> FineTuneJobStatus:
    """Return the job's status, which is empty until the operator has written one."""
    return job.status or FineTuneJobStatus()


def condition(job: FineTuneJob, kind: ConditionType) -> Condition | None:
    """Return the condition of type ``kind``, or None while the status is empty."""
    return next((found for found in status_of(job).conditions if found.type == kind), None)


def state(job: FineTuneJob) -> str:
    """Return the word that `kubectl get` shows in its State column, or `Pending` while the status is empty."""
    summary = condition(job, ConditionType.SUCCEEDED)
    return summary.reason if summary else NOT_SEEN


def state_message(job: FineTuneJob) -> str:
    """Return a sentence about what the job does or waits for, or how it ended.

    The sentence is the message of the condition `Succeeded`. Where that message is empty and the job has not ended, the
    sentence is the message of the first of the conditions `Accepted`, `Scheduled` and `Running` that is not True.
    """
    summary = condition(job, ConditionType.SUCCEEDED)
    if summary is None:
        return NOT_SEEN_MESSAGE
    if summary.message or summary.status != "Unknown":
        return summary.message
    for kind in (ConditionType.ACCEPTED, ConditionType.SCHEDULED, ConditionType.RUNNING):
        step = condition(job, kind)
        if step is not None and step.status != "True":
            return step.message
    return ""


def blocking_message(job: FineTuneJob) -> str:
    """Return why an unfinished job can't go on. The result is empty where nothing stops the job, and where
    `state_message` returns the same sentence already."""
    if ending(job):
        return ""
    accepted = condition(job, ConditionType.ACCEPTED)
    scheduled = condition(job, ConditionType.SCHEDULED)
    for step in (accepted, scheduled):
        if step is not None and step.status == "False" and step.message not in ("", state_message(job)):
            return step.message
    return ""


def ending(job: FineTuneJob) -> Ending | None:
    """Return how the job ended, or None while the job has not ended."""
    summary = condition(job, ConditionType.SUCCEEDED)
    if summary is None or summary.status == "Unknown":
        return None
    return Ending(summary.status == "True", summary.reason, summary.message)


def metric(job: FineTuneJob, name: str) -> MetricValue | None:
    """Return the newest value of the metric ``name``, for example of `loss`. Return None where the status has no such
    metric."""
    return next((found for found in status_of(job).metrics if found.name == name), None)


def task_of(job: FineTuneJob) -> str | None:
    """Return the name of the job's task, or of the entry point of the job's own grader. Return None where the job has
    no task."""
    return job.spec.dataset.task.label if job.spec.dataset.task is not None else None


def required_text(requirement: RequirementStatus) -> str:
    """Return what a requirement asks for, for example `at least 0.8, better than the base model`."""
    bounds = [f"at least {requirement.at_least}"] if requirement.at_least is not None else []
    bounds += [f"at most {requirement.at_most}"] if requirement.at_most is not None else []
    bounds += ["better than the base model"] if requirement.better_than_base else []
    return ", ".join(bounds)


def ungraded_text(scores: Scores | None) -> str:
    """Return how many of a model's answers were not graded, for example `2 of 40 answers not graded`, and the reasons.
    The result is empty where all answers were graded, and where ``scores`` is None, because the model was not
    scored."""
    if scores is None or not scores.not_graded:
        return ""
    reasons = "; ".join(f"{group.answers} because {group.reason}" for group in scores.ungraded)
    text = f"{scores.not_graded} of {scores.graded + scores.not_graded} answers not graded"
    return f"{text}: {reasons}" if reasons else text


def risen_text(evaluation: EvaluationStatus) -> str:
    """Return what the perplexity of all tokens means, where that of the tuned model is higher than that of the base
    model. The result is empty where it has not risen, or was not measured for both models."""
    before, after = (
        scores.all_token_perplexity if scores is not None else None for scores in (evaluation.base, evaluation.tuned)
    )
    lower, higher = measured(before), measured(after)
    return ALL_TOKENS_MEANING if lower is not None and higher is not None and higher > lower else ""


def scores_by_name(scores: Scores | None, task: str | None) -> dict[str, str]:
    """Return the values of all ``scores`` of a model, by the labels that `finetune watch` shows. The result is empty
    where the model was not scored.

    ``task`` is what `task_of` returns.
    """
    if scores is None:
        return {}
    measured = {
        "perplexity": scores.perplexity,
        ALL_TOKENS_LABEL: scores.all_token_perplexity,
        main_score_label(task): scores.task_score,
    } | {score.name: score.value for score in scores.scores}
    return {name: value for name, value in measured.items() if name is not None and value is not None}
