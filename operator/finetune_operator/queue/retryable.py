"""What lies outside a job's spec and stands in its way: shown in its conditions and tried again, never final."""

from __future__ import annotations

from finetune_core.api.conditions import Reason


class RetryableError(Exception):
    """An object can't be created for a reason that the job's author can't put right in the spec."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep the condition's ``reason`` and ``message``."""
        super().__init__(message)
        self.reason = reason
        self.message = message


FIRST_RETRY_SECONDS = 10.0
"""First pause before what failed is tried again; doubled up to 5 minutes."""
EVENTS_AFTER_SECONDS = 5.0
"""A pod that has been waiting this long is asked for its warning events."""
EVENTS_EVERY_SECONDS = 10.0
"""How often a waiting pod's events are read."""
