"""Condition types and reasons of a FineTuneJob: every word that the status can say, in one place."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.base import ApiModel


class ConditionType(StrEnum):
    """All conditions; each is present from the first status write."""

    READY = "Ready"
    """kstatus: True only when the job has succeeded."""
    RECONCILING = "Reconciling"
    """kstatus: True until the job is settled."""
    STALLED = "Stalled"
    """kstatus: True when the job ended without success and nothing more will be tried."""
    ACCEPTED = "Accepted"
    """The spec is valid and what it refers to was found."""
    SCHEDULED = "Scheduled"
    """All pods of the current attempt have a node."""
    RUNNING = "Running"
    """All ranks of the current attempt report."""
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    """At least one committed checkpoint lies in the bucket."""
    SUCCEEDED = "Succeeded"
    """The summary: Unknown until the end, True or False is final."""


class Reason(StrEnum):
    """Reasons of conditions. Those of `Succeeded` are the one word in kubectl's State column."""

    QUEUED = "Queued"
    """No pod exists yet."""
    STARTING = "Starting"
    """Pods exist, but not all ranks report."""
    RUNNING = "Running"
    """All ranks report."""
    RETRYING = "Retrying"
    """An attempt failed; the next starts after the back-off."""
    COMPLETED = "Completed"
    """The artifact is committed."""
    EARLY_STOPPED = "EarlyStopped"
    """Training stopped before its last step because the score no longer improved; the artifact is committed."""
    BAD_INPUT = "BadInput"
    """The spec or the data make the job impossible; the message names the field or file."""
    DIVERGED = "Diverged"
    """The loss or the gradient was not finite."""
    OUT_OF_MEMORY = "OutOfMemory"
    """A pod or GPU ran out of memory."""
    RETRIES_EXHAUSTED = "RetriesExhausted"
    """`runPolicy.maxRetries` charged retries failed."""
    NAME_CONFLICT = "NameConflict"
    """An object of the name that the operator needs exists and belongs to somebody else."""
    BACKEND_UNAVAILABLE = "BackendUnavailable"
    """The API server does not know PyTorchJob, or its webhook does not answer."""
    VALID = "Valid"
    """The spec can be run."""
    SCHEDULED = "Scheduled"
    """Every pod has a node."""
    WAITING_FOR_PODS = "WaitingForPods"
    """Pods are missing or have no node; the message says why."""
    COMMITTED = "Committed"
    """A checkpoint with COMMIT exists."""
    NONE_YET = "NoneYet"
    """Nothing of this kind exists yet."""
    IN_PROGRESS = "InProgress"
    """The job is not settled."""
    SETTLED = "Settled"
    """The job has ended."""


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
