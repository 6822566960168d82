"""What the operator does around attempts: `runPolicy`, the one section that may change at any time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, LabelValue, ObjectName, cel

Seconds = Annotated[int, Field(ge=60, le=31_536_000)]


class RunPolicySpec(ApiModel):
    """What the operator does around attempts; may change at any time."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.cancel || !oldSelf.cancel", "`cancel` must not change back to false; create a new FineTuneJob"),
        )
    )

    suspend: bool = False
    """true ends the attempt after a checkpoint, and keeps the next from starting; false goes on from there. Neither
    counts as a retry."""
    cancel: bool = False
    """true ends the job for good after a checkpoint: `Succeeded=False`, reason Cancelled. It can't be taken back."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Retries after failures that count; lost pods and nodes are retried without being counted."""
    active_deadline_seconds: Seconds | None = None
    """Longest time with running pods, over all attempts; absent: no limit."""
    pending_deadline_seconds: Seconds | None = None
    """Longest time until all pods of an attempt run, anew for each attempt; absent: no limit."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """Pods and PyTorchJob are removed this long after the job has ended; the FineTuneJob stays. Absent: they stay with
    it."""
    preflight: Literal["Run", "Skip"] | None = None
    """Whether a pod without GPUs checks store, model and data before GPUs are asked for; absent: as the operator was
    installed."""
    queue_name: Annotated[LabelValue, Field(min_length=1)] | None = None
    """Kueue's LocalQueue in the job's namespace; takes effect with the next attempt."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods; takes effect with the next attempt."""
