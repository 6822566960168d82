"""The two deadlines of `runPolicy`, and the pauses that the status records.

The active deadline limits how long pods may run in total. The pending deadline limits how long an attempt may wait for
its pods, and how long the preflight check may take. The functions are pure. `rules.py`, `attempts.py` and
`preflight.py` call them.
"""

from __future__ import annotations

from datetime import datetime

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CurrentAttempt

CLOCK_DIFFERENCE_SECONDS = 60.0
"""Seconds by which the clock of an earlier leader may have been ahead of this leader's clock. A recorded pause that
exceeds the longest possible pause by more than these seconds is ignored."""


def is_active_deadline_over(policy: RunPolicySpec, active_seconds: int) -> bool:
    """Return whether the job's pods have run for `runPolicy.activeDeadlineSeconds`, all attempts added up."""
    return policy.active_deadline_seconds is not None and active_seconds >= policy.active_deadline_seconds


def seconds_to_pending_deadline(policy: RunPolicySpec, current: CurrentAttempt, now: datetime) -> float | None:
    """Return within how many seconds all pods of the attempt must run; 0 or less where that time is over.

    The result is None where all pods have already run, while a queue or a person has suspended the child object, and
    where `runPolicy.pendingDeadlineSeconds` is absent.
    """
    if current.running_time is not None or current.admitted_time is None:
        return None
    return seconds_left(policy, since=current.admitted_time, now=now)


def seconds_left(policy: RunPolicySpec, *, since: datetime, now: datetime) -> float | None:
    """Return how many seconds of `runPolicy.pendingDeadlineSeconds`, counted from ``since``, are left at ``now``.

    The result is None where the field is absent. The function calculates with numbers of seconds, because another
    version may allow more seconds than a `timedelta` can hold.
    """
    limit = policy.pending_deadline_seconds
    return None if limit is None else limit - (now - since).total_seconds()


def seconds_of_pause(until: datetime | None, now: datetime, longest: float) -> float:
    """Return how many seconds of a recorded pause, which ends at ``until``, are left at ``now``.

    The result is 0 where the pause is over, or where ``until`` is None. No leader records a pause of more than
    ``longest`` seconds. So if more than ``longest`` + CLOCK_DIFFERENCE_SECONDS are left, the leader that recorded the
    pause had a wrong clock, and the result is 0 too.
    """
    left = 0.0 if until is None else (until - now).total_seconds()
    return left if 0 < left <= longest + CLOCK_DIFFERENCE_SECONDS else 0.0


def seconds_to_deadline(
    policy: RunPolicySpec, current: CurrentAttempt, *, now: datetime, active_seconds: int, any_pod_runs: bool
) -> float | None:
    """Return in how many seconds the earlier of the two deadlines is over; None where no deadline is running.

    ``active_seconds`` says for how many seconds the job's pods have run so far. The active deadline runs only where
    ``any_pod_runs`` is True.
    """
    waits = []
    if policy.active_deadline_seconds is not None and any_pod_runs:
        waits.append(float(policy.active_deadline_seconds - active_seconds))
    if (left := seconds_to_pending_deadline(policy, current, now)) is not None:
        waits.append(left)
    return max(0.0, min(waits)) if waits else None
