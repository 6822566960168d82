"""How an ended attempt is counted, exactly once, and how long the next one waits.

Pure functions on `status.attempts`, called by `attempts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.status import (
    RECENT_ATTEMPTS_LIMIT,
    AttemptCause,
    AttemptsStatus,
    CheckpointStatus,
    CurrentAttempt,
    PastAttempt,
)
from finetune_operator.decide.verdict import TEXT_LIMIT, Ruling, Verdict

FREE_IN_A_ROW = 3
"""After this many free attempts in a row without a new checkpoint the next one is charged, so that a job that makes no
progress ends."""
FIRST_BACKOFF_SECONDS = 10
LONGEST_BACKOFF_SECONDS = 300
SUSPENSIONS = (Cause.SUSPENDED, Cause.RESUMED_TOO_EARLY)
"""Reasons that stem from a decision of a person or a queue. Such an attempt is never charged and never delays the next
one, however often it happens."""


def cause_of(ruling: Ruling, now: datetime) -> AttemptCause:
    """Return ``ruling`` as `status.attempts.current.cause` stores it; ``now`` is the time of the ruling."""
    return AttemptCause(
        verdict=ruling.verdict,
        reason=ruling.reason[:64],
        message=ruling.message[:TEXT_LIMIT],
        node=ruling.node,
        time=now,
    )


def close(
    attempts: AttemptsStatus,
    current: CurrentAttempt,
    cause: AttemptCause,
    checkpoints: Sequence[CheckpointStatus],
    now: datetime,
) -> AttemptsStatus:
    """Return ``attempts`` with ``current`` moved to `recent` and counted.

    The attempt is counted once, because `current` is None afterwards.
    """
    verdict = cause.verdict
    if verdict == Verdict.FREE and cause.reason not in SUSPENSIONS:
        in_a_row = _free_in_a_row(attempts.recent, checkpoints)
        if in_a_row >= FREE_IN_A_ROW and not _progressed(current.start_time, checkpoints):
            verdict = Verdict.CHARGED
    past = PastAttempt(
        number=current.number,
        verdict=verdict,
        reason=cause.reason,
        message=cause.message,
        node=cause.node,
        start_time=current.start_time,
        end_time=now,
    )
    return attempts.model_copy(
        update={
            "charged": attempts.charged + (verdict == Verdict.CHARGED),
            "free": attempts.free + (verdict == Verdict.FREE),
            "current": None,
            "recent": [*attempts.recent, past][-RECENT_ATTEMPTS_LIMIT:],
        }
    )


def backoff(attempts: AttemptsStatus, checkpoints: Sequence[CheckpointStatus]) -> timedelta:
    """Return the pause before the next attempt: 10 s, doubled for each further attempt in a row without a checkpoint.

    The pause is 300 s at most.
    """
    row = 0
    for past in reversed(attempts.recent):
        if past.reason in SUSPENSIONS:
            continue
        if _progressed(past.start_time, checkpoints):
            break
        row += 1
    return timedelta(seconds=min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** max(0, row - 1)))


def _progressed(started: datetime, checkpoints: Sequence[CheckpointStatus]) -> bool:
    """Return whether a checkpoint was committed since ``started``."""
    return any(checkpoint.time >= started for checkpoint in checkpoints)


def _free_in_a_row(recent: Sequence[PastAttempt], checkpoints: Sequence[CheckpointStatus]) -> int:
    """Return how many of the newest attempts in a row were free and committed nothing; suspensions do not count."""
    row = 0
    for past in reversed(recent):
        if past.reason in SUSPENSIONS:
            continue
        if past.verdict != Verdict.FREE or _progressed(past.start_time, checkpoints):
            break
        row += 1
    return row
