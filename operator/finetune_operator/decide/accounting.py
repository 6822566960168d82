"""Counts an ended attempt exactly once, and computes how long the next attempt waits.

Pure functions on `status.attempts`, called by `attempts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import Reason
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
"""After this many free attempts in a row without a new checkpoint, the next free attempt without a new checkpoint is
charged, so that a job that makes no progress ends."""
FIRST_BACKOFF_SECONDS = 10
LONGEST_BACKOFF_SECONDS = 300
SUSPENSIONS = (Cause.SUSPENDED, Cause.RESUMED_TOO_EARLY)
"""Reasons of attempts that ended because `runPolicy.suspend` was set, or because a queue resumed the suspended
PyTorchJob too early. Attempts with these reasons are never charged and never make the back-off longer, however many
there are."""


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
    """Return ``attempts`` with ``current`` moved to `recent`, and counted where it is charged or free.

    ``cause`` is why ``current`` ended, and ``now`` is the time of its end. ``checkpoints`` are the job's committed
    checkpoints.

    A free attempt without a new checkpoint is charged where FREE_IN_A_ROW free attempts without a new checkpoint came
    right before it. Once an attempt with the reason NodeRefused was charged in this way, each further attempt with that
    reason is charged too, until a checkpoint is committed or an attempt is charged for another reason. The reason for
    such a row of refusals may be an image that no node can start. No attempt is counted twice, because
    `attempts.current` is None afterwards.
    """
    verdict = cause.verdict
    if verdict == Verdict.FREE and cause.reason not in SUSPENSIONS:
        in_a_row = _free_in_a_row(attempts.recent, checkpoints, cause.reason)
        if in_a_row >= FREE_IN_A_ROW and not _progressed(current.start_time, checkpoints):
            verdict = Verdict.CHARGED
    # Another version may have written ``cause`` and ``current``, with longer texts and larger numbers than this version
    # writes. So the texts are cut here, and the numbers are not validated.
    past = PastAttempt.model_construct(
        number=current.number,
        verdict=verdict[:32],
        reason=cause.reason[:64],
        message=cause.message[:TEXT_LIMIT],
        node=cause.node[:253],
        start_time=current.start_time,
        end_time=now,
    )
    return attempts.model_copy(
        update={
            "charged": attempts.charged + (verdict == Verdict.CHARGED),
            "free": attempts.free + (verdict == Verdict.FREE),
            "current": None,
            "memory_halvings": attempts.memory_halvings + is_halving(verdict, cause.reason),
            "recent": [*attempts.recent, past][-RECENT_ATTEMPTS_LIMIT:],
        }
    )


def is_halving(verdict: str, reason: str) -> bool:
    """Return whether the attempt after one that ended with ``verdict`` and ``reason`` has half its micro-batch."""
    return reason == Reason.OUT_OF_MEMORY and verdict != Verdict.PERMANENT


def backoff(attempts: AttemptsStatus, checkpoints: Sequence[CheckpointStatus]) -> timedelta:
    """Return the pause before the next attempt, from 10 s to 300 s.

    The pause is 10 s where the last attempt committed a checkpoint or is the first attempt in a row without a new
    checkpoint. Each further attempt in the row doubles the pause. Attempts that ended by a suspension are left out of
    the row. ``checkpoints`` are the committed checkpoints of the job.
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
    """Return whether one of ``checkpoints`` was committed since ``started``."""
    return any(checkpoint.time >= started for checkpoint in checkpoints)


def _free_in_a_row(recent: Sequence[PastAttempt], checkpoints: Sequence[CheckpointStatus], reason: str) -> int:
    """Return how many attempts in a row, back from the newest, were free and without a new checkpoint.

    Attempts that ended by a suspension are left out of the row. Where ``reason``, the reason of the attempt that ends
    now, is NodeRefused, charged attempts with that reason are counted too.
    """
    refused = reason == Cause.NODE_REFUSED
    row = 0
    for past in reversed(recent):
        if past.reason in SUSPENSIONS:
            continue
        if _progressed(past.start_time, checkpoints):
            break
        if past.verdict != Verdict.FREE and not (refused and past.reason == Cause.NODE_REFUSED):
            break
        row += 1
    return row
