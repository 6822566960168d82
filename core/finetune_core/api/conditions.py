"""The types and the reasons of the conditions in a FineTuneJob's status, and the model of a condition.

`condition_reasons.py` explains each reason, and lists the reasons that each condition may have.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.base import ApiModel

REASON_LENGTH = 64
"""Largest number of characters of a reason that the operator writes."""


class ConditionType(StrEnum):
    """The types of the conditions that the operator sets. The status has conditions of all types as soon as the
    operator has written the status for the first time."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    ACCEPTED = "Accepted"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    SUCCEEDED = "Succeeded"


class Reason(StrEnum):
    """The reasons of all conditions. `kubectl get ftj` shows the reason of the condition `Succeeded` in its column
    State."""

    PREFLIGHT = "Preflight"
    OUTSIDE_FAILURE = "OutsideFailure"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    COMPLETED = "Completed"
    EARLY_STOPPED = "EarlyStopped"
    GATE_FAILED = "GateFailed"
    BAD_INPUT = "BadInput"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    CANCELLED = "Cancelled"
    NAME_CONFLICT = "NameConflict"
    BACKEND_UNAVAILABLE = "BackendUnavailable"
    VALID = "Valid"
    SCHEDULED = "Scheduled"
    WAITING_FOR_PODS = "WaitingForPods"
    COMMITTED = "Committed"
    NONE_YET = "NoneYet"
    CHECKPOINT_OVERDUE = "CheckpointOverdue"
    IN_PROGRESS = "InProgress"
    SETTLED = "Settled"


def valid_reason(text: str) -> str:
    """Return ``text`` as a reason that the API server accepts. The result consists of the letters, digits and
    underscores of ``text``, begins with a letter, and is cut after 64 characters. Where no character is left, the
    result is `Unknown`.

    The operator calls this function for the reason of every condition, because some reasons come from the stored
    status, and another version may have written that status.
    """
    letters = re.sub(r"[^A-Za-z0-9_]", "", text).lstrip("0123456789_")
    return letters[:REASON_LENGTH] or "Unknown"


class Condition(ApiModel):
    """A condition in a job's status. The bounds of the fields are those of Kubernetes' metav1.Condition, because other
    programs may also write conditions into the status."""

    type: Annotated[str, Field(max_length=316)]
    """Type of the condition, for example `Succeeded`."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds: True, False or Unknown."""
    observed_generation: Annotated[int, Field(ge=0)]
    """`metadata.generation` of the spec that the condition was computed from."""
    last_transition_time: datetime
    """Time at which `status` last changed."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Reason of the status as a CamelCase word for programs, for example `WaitingForPods`."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """A sentence for people, which names the pod, field or file in question."""
