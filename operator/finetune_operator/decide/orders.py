"""What ends an attempt, or keeps the next from starting, though nothing failed: `runPolicy` as a person set it, and its
two clocks. Pure; `attempts` asks before and after it looks at the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import Reason
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CurrentAttempt
from finetune_operator import messages
from finetune_operator.decide.verdict import Ruling, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """What the deadlines are measured with."""

    now: datetime
    active_seconds: int
    """Seconds with a running pod over all attempts, until now."""
    any_pod_runs: bool
    waiting_for: str
    """What the status says that the attempt waits for."""


def ordered_end(policy: RunPolicySpec, current: CurrentAttempt, clocks: Clocks) -> Ruling | None:
    """Return why the attempt ends without a failure: cancelled, suspended, or a deadline is over."""
    if policy.cancel:
        return Ruling(verdict=Verdict.PERMANENT, reason=Reason.CANCELLED, message=messages.CANCELLED)
    if policy.suspend:
        return Ruling(verdict=Verdict.FREE, reason=Cause.SUSPENDED, message=messages.SUSPENDED)
    if is_active_deadline_over(policy, clocks.active_seconds):
        message = messages.active_deadline(policy.active_deadline_seconds or 0)
        return Ruling(verdict=Verdict.PERMANENT, reason=Reason.DEADLINE_EXCEEDED, message=message)
    ends = pending_end(policy, current)
    if ends is not None and ends <= clocks.now:
        message = messages.pending_deadline(policy.pending_deadline_seconds or 0, clocks.waiting_for)
        return Ruling(verdict=Verdict.PERMANENT, reason=Reason.DEADLINE_EXCEEDED, message=message)
    return None


def is_active_deadline_over(policy: RunPolicySpec, active_seconds: int) -> bool:
    """Tell whether all the time that pods may run is used up."""
    return policy.active_deadline_seconds is not None and active_seconds >= policy.active_deadline_seconds


def pending_end(policy: RunPolicySpec, current: CurrentAttempt) -> datetime | None:
    """Return when the attempt's pods must all run; None where they did, where a queue holds it, or without a limit."""
    if policy.pending_deadline_seconds is None or current.running_time is not None or current.admitted_time is None:
        return None
    return current.admitted_time + timedelta(seconds=policy.pending_deadline_seconds)


def seconds_to_deadline(policy: RunPolicySpec, current: CurrentAttempt, clocks: Clocks) -> float | None:
    """Return in how many seconds the next deadline is over, if nothing changes; None where none is running."""
    waits = []
    if policy.active_deadline_seconds is not None and clocks.any_pod_runs:
        waits.append(float(policy.active_deadline_seconds - clocks.active_seconds))
    if (ends := pending_end(policy, current)) is not None:
        waits.append((ends - clocks.now).total_seconds())
    return max(0.0, min(waits)) if waits else None
