"""Condition types and reasons of a FineTuneJob: every word that the status can say, in one place.

What each means, and which condition may say which, stands in `states`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.base import ApiModel


class ConditionType(StrEnum):
    """All conditions; each is present from the first status write."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    ACCEPTED = "Accepted"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    SUCCEEDED = "Succeeded"


class Reason(StrEnum):
    """Reasons of conditions. Those of `Succeeded` are the one word in kubectl's State column."""

    PREFLIGHT = "Preflight"
    OUTSIDE_FAILURE = "OutsideFailure"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    COMPLETED = "Completed"
    EARLY_STOPPED = "EarlyStopped"
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


class Condition(ApiModel):
    """metav1.Condition."""

    type: Annotated[str, Field(max_length=64)]
    """What the condition speaks of."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Annotated[int, Field(ge=0)]
    """Generation of the spec that it was computed from."""
    last_transition_time: datetime
    """When `status` last changed."""
    reason: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Za-z]*$")]
    """One CamelCase word for programs."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """A sentence for people."""
