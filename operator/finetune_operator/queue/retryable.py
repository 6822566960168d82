"""Errors that the operator shows in a job's conditions and retries, and the intervals of such retries.

A missing CRD, a webhook or a quota is such an error: a change outside the job's spec can remove the cause, so the
error never ends the job. `objects/` and `act/` raise `RetryableError`; `reconcile.py` writes it into the status.
"""

from __future__ import annotations

from finetune_core.api.conditions import Reason


class RetryableError(Exception):
    """An object of the job can't be created at the moment, for a cause outside the job's spec."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep ``reason`` and ``message`` for the condition in which the error is shown."""
        super().__init__(message)
        self.reason = reason
        self.message = message


FIRST_RETRY_SECONDS = 10.0
"""Delay before the first retry. The delay doubles with each further failure, up to 5 minutes (`backoff_seconds`)."""
EVENTS_AFTER_SECONDS = 5.0
"""Age in seconds at which the operator starts to read the warning events of a pod that does not run yet."""
EVENTS_EVERY_SECONDS = 10.0
"""Interval in seconds between two reads of the warning events of a pod that does not run yet."""
