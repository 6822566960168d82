"""The two deadlines of `runPolicy`: how long pods may run in total, and how long an attempt may wait for its pods.

Pure functions. `rules.py` asks whether a deadline is over. `attempts.py` asks in how many seconds the next one is over.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CurrentAttempt


def is_active_deadline_over(policy: RunPolicySpec, active_seconds: int) -> bool:
    """Return whether the job's pods have run for `runPolicy.activeDeadlineSeconds`, all attempts added up."""
    return policy.active_deadline_seconds is not None and active_seconds >= policy.active_deadline_seconds


def pending_deadline(policy: RunPolicySpec, current: CurrentAttempt) -> datetime | None:
    """Return the time by which all pods of the attempt must run.

    None where all pods have already run, while a queue or a person has suspended the child object, and where
    `runPolicy.pendingDeadlineSeconds` is absent.
    """
    if policy.pending_deadline_seconds is None or current.running_time is not None or current.admitted_time is None:
        return None
    return current.admitted_time + timedelta(seconds=policy.pending_deadline_seconds)


def seconds_to_deadline(
    policy: RunPolicySpec, current: CurrentAttempt, *, now: datetime, active_seconds: int, any_pod_runs: bool
) -> float | None:
    """Return in how many seconds the earlier of the two deadlines is over; None where no deadline is running."""
    waits = []
    if policy.active_deadline_seconds is not None and any_pod_runs:
        waits.append(float(policy.active_deadline_seconds - active_seconds))
    if (deadline := pending_deadline(policy, current)) is not None:
        waits.append((deadline - now).total_seconds())
    return max(0.0, min(waits)) if waits else None
