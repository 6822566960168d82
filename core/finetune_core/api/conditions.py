"""The types and reasons of a FineTuneJob's conditions.

`condition_reasons.py` says what each reason means and which condition may carry which reason.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.base import ApiModel


class ConditionType(StrEnum):
    """The types of all conditions. Every condition is present from the first status write on."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    ACCEPTED = "Accepted"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    SUCCEEDED = "Succeeded"


class Reason(StrEnum):
    """Reasons of conditions. The reason of the `Succeeded` condition is the State column of `kubectl get ftj`."""

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
    """A condition as in Kubernetes' metav1.Condition."""

    type: Annotated[str, Field(max_length=64)]
    """Type of the condition, for example `Succeeded`."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds: True, False or Unknown."""
    observed_generation: Annotated[int, Field(ge=0)]
    """`metadata.generation` of the spec that the condition was computed from."""
    last_transition_time: datetime
    """Time at which `status` last changed."""
    reason: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Za-z]*$")]
    """Reason of the status as a CamelCase word for programs, for example `WaitingForPods`."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """A sentence for people that names the pod, field or file that it is about."""
