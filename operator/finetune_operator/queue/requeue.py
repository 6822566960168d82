"""When a job is to be reconciled again: after an event, after a pause, or at once.

"At once" exists only after a write. A reconcile that changed nothing would otherwise be repeated without a pause, and
would read the same state and decide the same, as fast as the API server answers. So a `Requeue` without a `Write` can
not ask for less than `LEAST_PAUSE_SECONDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEAST_PAUSE_SECONDS: Final = 1.0
"""Shortest time in seconds between a reconcile of a job that has written nothing and the next reconcile of the job.
Each reconcile rounds its time down to whole seconds, so a reconcile within the same second would see the same time."""


@dataclass(frozen=True, slots=True)
class Write:
    """Proof that the API server holds another state than the state that this reconcile has read.

    Only the code that sends a write creates a `Write`, once the API server has answered that the object has changed.
    """

    what: str
    """What was written, for example "status"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Requeue:
    """When a job is to be reconciled again even if no watch event comes."""

    write: Write | None = None
    """What this reconcile has written; None where it has written nothing. After a write the job is reconciled again at
    once, because its state has changed."""
    pause: float | None = None
    """Seconds until the next reconcile where nothing was written. Less than `LEAST_PAUSE_SECONDS` counts as
    `LEAST_PAUSE_SECONDS`. None means to wait for the next watch event or resync."""
    gone: bool = False
    """Whether the job no longer exists."""

    @property
    def after(self) -> float | None:
        """Seconds until the job is to be reconciled again: 0 means at once; None means at the next watch event."""
        if self.write is not None:
            return 0.0
        return None if self.pause is None else max(LEAST_PAUSE_SECONDS, self.pause)
