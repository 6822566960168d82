"""`runPolicy`: how the operator starts, stops, retries and cleans up attempts. Users may edit this section at any time,
also while the job runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, LabelValue, ObjectName, cel

Seconds = Annotated[int, Field(ge=60, le=31_536_000)]
"""A deadline in seconds, from a minute to a year."""


class RunPolicySpec(ApiModel):
    """How the operator starts, stops, retries and cleans up attempts. Users may edit this section at any time, also
    while the job runs."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.cancel || !oldSelf.cancel", "`cancel` must not change back to false; create a new FineTuneJob"),
        )
    )

    suspend: bool = False
    """true makes the pods save a checkpoint and ends the running attempt. No other attempt starts until the field is
    false again, and then the next attempt resumes from that checkpoint. A suspension does not count as a retry."""
    cancel: bool = False
    """true makes the pods save a checkpoint and ends the job with `Succeeded=False` and the reason Cancelled. A
    cancelled job can't be resumed, because `cancel` can't change back to false."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Largest number of retries after failed attempts, over the whole job. Attempts that ended through no fault of the
    job, for example because a pod or a node was lost, are retried too and do not count, except after three such
    attempts in a row without a new checkpoint."""
    active_deadline_seconds: Seconds | None = None
    """Largest number of seconds in which pods of the job may run, added up over all attempts. After this time the job
    ends as failed. Absent: no limit."""
    pending_deadline_seconds: Seconds | None = None
    """Largest number of seconds that the preflight check may take, all its tries and waits together. The same number
    limits the time until all pods of an attempt run. For each attempt this time begins anew at the attempt's start or,
    with a queue, when the queue admits the attempt. Absent: no limit."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """Seconds from the end of the job until the PyTorchJob and the pods of its last attempt are deleted, where they
    still exist. The FineTuneJob itself stays. Absent: they stay until the FineTuneJob is deleted, unless a pod still
    runs a minute after the end of the job, for example because of a sidecar. They are deleted then."""
    preflight: Literal["Run", "Skip"] | None = None
    """Whether a pod without GPUs checks object store, model and data before the first attempt asks for GPUs. The pod
    runs the trainer image with the argument `preflight`. The check also finds the checkpoints and the artifact of a
    former job with the same name and training. With Skip the job does not look for them, and trains anew unless
    `storage.runId` names the former job's folder. Absent: the setting that the operator was installed with."""
    queue_name: Annotated[LabelValue, Field(min_length=1)] | None = None
    """`metadata.name` of Kueue's LocalQueue in the job's namespace. A change takes effect with the next attempt."""
    priority_class_name: ObjectName | None = None
    """`metadata.name` of the pods' PriorityClass. A change takes effect with the next attempt."""
