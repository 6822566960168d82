"""Which events a status change is worth: a pure comparison of the stored status with the written one.

Events tell transitions only. Their names are made from job, reason and occasion, so that repeating one is a 409.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from finetune_core.api import API_VERSION, KIND
from finetune_core.api.conditions import Condition, ConditionType, Reason
from finetune_core.api.status import FineTuneJobStatus
from finetune_operator.decide.verdict import Verdict
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.resources import EVENTS
from finetune_operator.objects.labels import MANAGER
from finetune_operator.queue.work_queue import Key

NOTE_LIMIT = 1024
_WANTED = (Reason.SUSPENDED, Reason.CANCELLED)
"""Ends of attempts that a person ordered: no warning is due."""


class EventReason(StrEnum):
    """Reasons of the operator's events, beside the reasons of `Accepted` and `Succeeded`."""

    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    RUNNING = "Running"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """An event to be."""

    reason: str
    note: str
    warning: bool
    occasion: str
    """What sets two events of the same reason apart: the attempt's number or the moment."""
    recurs: bool = False
    """Whether it may come again and again without an attempt between: then it is told once a minute."""


def notices(old: FineTuneJobStatus, new: FineTuneJobStatus, now: datetime) -> list[Notice]:
    """Return the events of the transition from ``old`` to ``new``."""
    found: list[Notice] = []
    moment = now.isoformat(timespec="seconds")
    told = {past.number for past in old.attempts.recent}
    for past in new.attempts.recent:
        if past.number not in told and past.verdict != Verdict.SUCCEEDED:
            note = f"attempt {past.number} ended ({past.verdict}, {past.reason}): {past.message}"
            found.append(_notice(EventReason.ATTEMPT_ENDED, note, past.reason not in _WANTED, str(past.number)))
    current = new.attempts.current
    if new.attempts.started > old.attempts.started and current is not None:
        note = f"attempt {current.number} was started"
        found.append(_notice(EventReason.ATTEMPT_STARTED, note, False, str(current.number)))
    before = {condition.type: condition for condition in old.conditions}
    ended = any(item.type == ConditionType.SUCCEEDED and item.status != "Unknown" for item in new.conditions)
    for condition in new.conditions:
        if ended and condition.type == ConditionType.ACCEPTED:
            continue  # a spec that is refused ends the job: one event says both
        if _changed(before.get(condition.type), condition):
            found += _of_condition(condition, moment, new.attempts.started)
    return found


def _changed(old: Condition | None, new: Condition) -> bool:
    return old is None or (old.status, old.reason) != (new.status, new.reason)


def _of_condition(condition: Condition, moment: str, attempt: int) -> list[Notice]:
    """Return the event that a changed condition is worth, if any."""
    kind, status = condition.type, condition.status
    if kind == ConditionType.SUCCEEDED and status != "Unknown":
        return [_notice(condition.reason, condition.message, status == "False", "settled")]
    if kind == ConditionType.ACCEPTED and status == "False":
        notice = _notice(condition.reason, condition.message, True, moment)
        return [replace(notice, recurs=True)]
    if kind == ConditionType.RUNNING and status == "True":
        return [_notice(EventReason.RUNNING, condition.message, False, str(attempt))]
    if kind == ConditionType.CHECKPOINT_AVAILABLE and condition.reason == Reason.CHECKPOINT_OVERDUE:
        return [replace(_notice(condition.reason, condition.message, True, moment), recurs=True)]
    if kind == ConditionType.CHECKPOINT_AVAILABLE and status == "True":
        return [_notice(EventReason.CHECKPOINT_AVAILABLE, condition.message, False, "first")]
    return []


def _notice(reason: str, note: str, warning: bool, occasion: str) -> Notice:
    return Notice(reason=reason, note=note[:NOTE_LIMIT], warning=warning, occasion=occasion)


def event_manifest(notice: Notice, key: Key, uid: str, now: datetime, instance: str) -> Manifest:
    """Return the events.k8s.io/v1 Event of ``notice`` about the job."""
    digest = hashlib.sha256(f"{uid}/{notice.reason}/{notice.occasion}".encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENTS.api_version,
        "kind": "Event",
        "metadata": {"name": f"{key.name}.{digest}", "namespace": key.namespace},
        "type": "Warning" if notice.warning else "Normal",
        "reason": notice.reason,
        "note": notice.note,
        "action": "Reconcile",
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"finetune.dev/{MANAGER}",
        "reportingInstance": instance[:128],
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": key.name,
            "namespace": key.namespace,
            "uid": uid,
        },
    }
