"""Decides which Kubernetes events to create, by comparing the stored status of a job with the new status.

Pure functions; `event_recorder.py` creates the events. An event's name is made from job, reason and occasion, so that
the API server answers 409 where the operator creates the same event again after a crash.
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
from finetune_operator.queue.key import Key

NOTE_LIMIT = 1024
"""Largest number of bytes of an event's note that the API server accepts. A longer note is cut."""
_ORDERED_BY_A_PERSON = (Reason.SUSPENDED, Reason.CANCELLED)
"""Reasons for which the event about an ended attempt is no warning, because a person ordered the end."""


class EventReason(StrEnum):
    """Reasons of those events that have a reason of their own. All other events have the reason of a condition."""

    TAKEN_OVER = "TakenOver"
    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    RUNNING = "Running"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """A Kubernetes event that is to be created about a job."""

    reason: str
    note: str
    warning: bool
    occasion: str
    """What distinguishes two events of the same reason: the attempt's number, the time of the change, or the `runId` of
    the former job whose run is taken over. A fixed word where a job has at most one such event."""
    recurs: bool = False
    """Whether the event may come many times within one attempt. Such an event is created once a minute at most."""


def events_between(old: FineTuneJobStatus, new: FineTuneJobStatus, now: datetime) -> list[JobEvent]:
    """Return the events to create for the change of the status from ``old`` to ``new``; ``now`` is the current time."""
    found: list[JobEvent] = []
    moment = now.isoformat(timespec="seconds")
    known = {past.number for past in old.attempts.recent}
    for past in new.attempts.recent:
        if past.number not in known and past.verdict != Verdict.SUCCEEDED:
            note = f"attempt {past.number} ended ({past.verdict}, {past.reason}): {past.message}"
            warning = past.reason not in _ORDERED_BY_A_PERSON
            found.append(_event(EventReason.ATTEMPT_ENDED, note, warning, str(past.number)))
    former = new.preflight.taken_over if new.preflight else None
    if former is not None and (old.preflight is None or old.preflight.taken_over != former):
        found.append(_event(EventReason.TAKEN_OVER, former.message, False, former.run_id))
    current = new.attempts.current
    if new.attempts.started > old.attempts.started and current is not None:
        note = f"attempt {current.number} was started"
        found.append(_event(EventReason.ATTEMPT_STARTED, note, False, str(current.number)))
    before = {condition.type: condition for condition in old.conditions}
    ended = any(item.type == ConditionType.SUCCEEDED and item.status != "Unknown" for item in new.conditions)
    for condition in new.conditions:
        if ended and condition.type == ConditionType.ACCEPTED:
            continue  # the spec or the preflight check ended the job, and the event about `Succeeded` says why
        if _changed(before.get(condition.type), condition):
            found += _of_condition(condition, moment, new.attempts.started)
    return found


def _changed(old: Condition | None, new: Condition) -> bool:
    return old is None or (old.status, old.reason) != (new.status, new.reason)


def _of_condition(condition: Condition, moment: str, attempt: int) -> list[JobEvent]:
    """Return a list with the event to create for the changed ``condition``; empty where the change needs no event.

    ``moment`` is the time of the change, and ``attempt`` the number of the newest attempt. Either may become the
    occasion of the event.
    """
    kind, status = condition.type, condition.status
    if kind == ConditionType.SUCCEEDED and status != "Unknown":
        return [_event(condition.reason, condition.message, status == "False", "settled")]
    if kind == ConditionType.ACCEPTED and status == "False":
        return [replace(_event(condition.reason, condition.message, True, moment), recurs=True)]
    if kind == ConditionType.RUNNING and status == "True":
        return [_event(EventReason.RUNNING, condition.message, False, str(attempt))]
    if kind == ConditionType.CHECKPOINT_AVAILABLE and condition.reason == Reason.CHECKPOINT_OVERDUE:
        return [replace(_event(condition.reason, condition.message, True, moment), recurs=True)]
    if kind == ConditionType.CHECKPOINT_AVAILABLE and status == "True":
        return [_event(EventReason.CHECKPOINT_AVAILABLE, condition.message, False, "first")]
    return []


def _event(reason: str, note: str, warning: bool, occasion: str) -> JobEvent:
    note = note.encode(errors="replace")[:NOTE_LIMIT].decode(errors="ignore")
    return JobEvent(reason=reason, note=note, warning=warning, occasion=occasion)


def event_manifest(event: JobEvent, key: Key, uid: str, now: datetime, instance: str) -> Manifest:
    """Return the manifest of the event about the job with ``uid``; ``instance`` is the name of the operator's pod."""
    digest = hashlib.sha256(f"{uid}/{event.reason}/{event.occasion}".encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENTS.api_version,
        "kind": "Event",
        "metadata": {"name": f"{key.name}.{digest}", "namespace": key.namespace},
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "note": event.note,
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
