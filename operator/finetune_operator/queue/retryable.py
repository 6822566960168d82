"""The error after which the operator tries again to create a job's objects, and how long it waits for the first retry
and between reads of warning events.

The cause of the error is for example a missing CRD, a webhook or a quota. A change outside the job's spec can remove
such a cause, so the error never ends the job. `objects/` and `act/` raise `RetryableError`. `reconcile.py` uses
`RetryableError` for a spec or status that can't be used at the moment. `status/` shows the error in the conditions.
"""

from __future__ import annotations

from finetune_core.api.conditions import Reason


class RetryableError(Exception):
    """Nothing can be created for the job at the moment.

    Mostly an object can't be created for a cause outside the job's spec. With the reason BadInput, this version of the
    operator can't use the job's spec or status.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep ``reason`` and ``message``, which the conditions of the job will show."""
        super().__init__(message)
        self.reason = reason
        self.message = message


FIRST_RETRY_SECONDS = 10.0
"""Seconds before the first retry. The delay doubles with each further failure, up to 300 s (`backoff_seconds`)."""
EVENTS_AFTER_SECONDS = 5.0
"""Age in seconds from which on the operator reads the warning events of a pod or attempt that does not run yet."""
EVENTS_EVERY_SECONDS = 10.0
"""Seconds between two reads of the warning events of a pod or attempt that does not run yet."""
