"""How an ended attempt is accounted, once, and how long the next one waits. Pure functions on `status.attempts`."""

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
from finetune_operator.decide.verdict import Ruling, Verdict

FREE_IN_A_ROW = 3
"""After this many free attempts without a new checkpoint the next one is charged."""
FIRST_BACKOFF_SECONDS = 10
LONGEST_BACKOFF_SECONDS = 300
TEXT_LIMIT = 1024
SUSPENSIONS = (Cause.SUSPENDED, Cause.RESUMED_TOO_EARLY)
"""A person's or a queue's decision, however often: never charged, and no reason to wait."""


def cause_of(ruling: Ruling, now: datetime) -> AttemptCause:
    """Return ``ruling`` as the status keeps it."""
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
    """Account the attempt: once, because `current` is gone afterwards."""
    verdict = cause.verdict
    if verdict == Verdict.FREE and cause.reason not in SUSPENSIONS:
        in_vain = _free_row(attempts.recent, checkpoints) >= FREE_IN_A_ROW
        if in_vain and not _progressed(current.start_time, checkpoints):
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
    """Return the pause before the next attempt: 10 s, doubled for each attempt in a row that committed nothing."""
    row = 0
    for past in reversed(attempts.recent):
        if past.reason in SUSPENSIONS:
            continue
        if _progressed(past.start_time, checkpoints):
            break
        row += 1
    return timedelta(seconds=min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** max(0, row - 1)))


def _progressed(started: datetime, checkpoints: Sequence[CheckpointStatus]) -> bool:
    """Whether a checkpoint was committed since ``started``."""
    return any(checkpoint.time >= started for checkpoint in checkpoints)


def _free_row(recent: Sequence[PastAttempt], checkpoints: Sequence[CheckpointStatus]) -> int:
    """Return how many of the newest attempts in a row were free and committed nothing; suspensions do not count."""
    row = 0
    for past in reversed(recent):
        if past.reason in SUSPENSIONS:
            continue
        if past.verdict != Verdict.FREE or _progressed(past.start_time, checkpoints):
            break
        row += 1
    return row
