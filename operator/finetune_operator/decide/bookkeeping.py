"""What the operator must not lose in a crash: how many attempts were started and counted, number and cause of the
current attempt, and the record of the preflight check.

`decision.py` calls `bookkeeping` to find out whether the status must be written before an object is changed. All values
come from fields that `status/urgency.py` lists among those that are written at once. So a decision that must be written
first never waits.
"""

from __future__ import annotations

from finetune_core.api.status import AttemptsStatus, PreflightStatus


def bookkeeping(attempts: AttemptsStatus, preflight: PreflightStatus | None) -> tuple[object, ...]:
    """Return those values of the status that must be written before any object is created or deleted.

    The callers only compare the values of two statuses with each other.
    """
    current = attempts.current
    return (
        attempts.started,
        attempts.charged,
        attempts.free,
        current.number if current else None,
        current.cause if current else None,
        preflight,
    )
