"""What the operator must not lose in a crash: how many attempts were started and counted, the number of the current
attempt and the cause of its end, and the record of the preflight check.

`decision.py` calls `bookkeeping` to find out whether the status must be written before an object is changed. All values
come from fields that the operator computes itself (`OWN_FIELDS` in `status/urgency.py`), and none from a field that a
report fills in.
"""

from __future__ import annotations

from finetune_core.api.status import AttemptsStatus, PreflightStatus


def bookkeeping(attempts: AttemptsStatus, preflight: PreflightStatus | None) -> tuple[object, ...]:
    """Return those values of the status that must be written before any object is created or deleted.

    The caller only compares the result for one status with the result for another status.
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
