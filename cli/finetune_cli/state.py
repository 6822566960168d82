"""What a FineTuneJob's conditions say to a person: its state in a word, what it waits for, how it ended.

In: a FineTuneJob as the API server stores it. Out: words and sentences. Pure; called by both views and the commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.api.conditions import Condition, ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import FineTuneJobStatus, MetricValue, Scores

NOT_SEEN = "Pending"
NOT_SEEN_MESSAGE = "no operator has looked at it yet; `kubectl get pods -A -l app.kubernetes.io/name=finetune-operator`"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a settled job ended."""

    succeeded: bool
    reason: str
    message: str


def status_of(job: FineTuneJob) -> FineTuneJobStatus:
    """Return the status, empty where the operator has not written one yet."""
    return job.status or FineTuneJobStatus()


def condition(job: FineTuneJob, kind: ConditionType) -> Condition | None:
    """Return the condition of ``kind``, or None before the first status."""
    return next((found for found in status_of(job).conditions if found.type == kind), None)


def state(job: FineTuneJob) -> str:
    """Return the word that `kubectl get` shows in its State column."""
    summary = condition(job, ConditionType.SUCCEEDED)
    return summary.reason if summary else NOT_SEEN


def state_message(job: FineTuneJob) -> str:
    """Return what the job does or waits for, or how it ended.

    That is the summary's message; where it is empty, the message of the first step on the way that is not reached.
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
    """Return what keeps an unfinished job from going on, where the summary does not say it itself; else nothing."""
    if ending(job):
        return ""
    accepted = condition(job, ConditionType.ACCEPTED)
    scheduled = condition(job, ConditionType.SCHEDULED)
    for step in (accepted, scheduled):
        if step is not None and step.status == "False" and step.message not in ("", state_message(job)):
            return step.message
    return ""


def ending(job: FineTuneJob) -> Ending | None:
    """Return how the job ended, or None while it is not settled."""
    summary = condition(job, ConditionType.SUCCEEDED)
    if summary is None or summary.status == "Unknown":
        return None
    return Ending(summary.status == "True", summary.reason, summary.message)


def metric(job: FineTuneJob, name: str) -> MetricValue | None:
    """Return the newest value of a metric."""
    return next((found for found in status_of(job).metrics if found.name == name), None)


def scores_by_name(scores: Scores | None) -> dict[str, str]:
    """Return every score that was measured under the name that people see; nothing where the model was not scored."""
    if scores is None:
        return {}
    measured = {
        "perplexity": scores.perplexity,
        "perplexity of all tokens": scores.all_token_perplexity,
        "right answers": scores.task_score,
    } | {score.name: score.value for score in scores.scores}
    return {name: value for name, value in measured.items() if value is not None}
