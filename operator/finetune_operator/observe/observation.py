"""What one reconcile has read for a job that has not ended, as immutable values. `observer.py` makes these values; the
pure functions of `decide/` and `status/` take them as input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CheckpointStatus, CurrentAttempt, UsageStatus
from finetune_core.contract import Result
from finetune_operator.objects.disk_space import ModelRoom
from finetune_operator.objects.observations import ChildObservation, PodObservation
from finetune_operator.observe.named_job import NamedJob


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightObservation:
    """What was read for the preflight check, which runs before attempt 1."""

    enabled: bool = False
    """Whether the job is to be checked. `runPolicy.preflight` decides or, if it is absent, the operator's default."""
    pods: Sequence[PodObservation] = ()
    """Preflight pods of the job. The `index` of each of these pods is the number of the try, counted from 1."""
    problem: str = ""
    """Why ConfigMap or pod of the current try could not be created; empty where the pod exists or nothing failed."""
    job_uid: str = ""
    """`metadata.uid` of the job, which distinguishes the job's own run from the run of a former job."""
    chosen_run_id: str = ""
    """`storage.runId`; empty where the field is absent, or where this version can't read the spec."""
    runs_folder: str = ""
    """`s3://` address of the folder that holds the folders of all jobs, also former ones, with this job's namespace and
    name. Empty where this version can not read the spec."""
    model_room: ModelRoom | None = None
    """The volume for the files of the base model. None where the job states no size for this volume, where the model is
    used where it lies, and where this version can't read the spec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchObservation:
    """How the spec lets a process compute its share of a global batch."""

    planned: int
    """Examples that the process computes at once where no attempt ran out of memory."""
    share: int
    """Examples of a global batch that the process computes."""
    packed: bool = False
    """Whether the examples are packed into sequences."""
    on_gpus: bool
    """Whether the job computes on GPUs, whose memory is not that of the pod."""
    advice: str = ""
    """`status.plan.advice`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobObservation:
    """What was read for a job that has not ended."""

    now: datetime
    nodes: int
    """`spec.resources.nodes`: the number of pods of an attempt."""
    policy: RunPolicySpec
    child: ChildObservation | None
    """The child object (PyTorchJob) of the newest attempt, whether that attempt goes on or has ended. None where the
    child does not exist."""
    child_uid: str
    """Uid of the current attempt's child as the status records it. Empty between two attempts, and where no child was
    seen yet."""
    pods: Sequence[PodObservation]
    """The pods of all attempts of the job that still exist. Preflight pods are in `preflight`."""
    undeletable: frozenset[str] = frozenset()
    """Uids of pods whose child is gone and whose deletion the API server has refused. Nothing waits for such pods."""
    checkpoints: Sequence[CheckpointStatus]
    """Committed checkpoints of the job, oldest first. They are those of the newest report, or of the status without a
    report."""
    usage: UsageStatus
    """What the job has used until `now`: GPU seconds, and seconds in which at least one of its pods ran."""
    waiting_for: str
    """What the attempt waits for: the creation of its objects, pods that do not run yet (for example "pod a-worker-0:
    0/3 nodes are available"), or its first report. Empty where that is not known."""
    final_result: Result | None
    """The trainer's result from the newest report of the newest attempt. None before the final report."""
    last_phase: str = ""
    """Phase of the trainer in the newest report of the newest attempt, for example "Training"; empty if no report."""
    batch: BatchObservation | None = None
    """None where this version can't read the spec."""
    warning: str = ""
    """Newest warning event about a pod that does not start, such as "FailedMount: secret x not found", or about a child
    object without pods; else empty."""
    preflight: PreflightObservation = field(default_factory=PreflightObservation)
    named_job: NamedJob | None = None
    """The job that `model.adapter.job` names. None where the job names none, where the artifact to start from is
    recorded already, while an attempt is current, and where this version can't read the spec."""

    @property
    def held(self) -> bool:
        """Whether the child is suspended, for example because a queue such as Kueue has not admitted the attempt."""
        return self.child is not None and self.child.suspended

    def pods_of(self, attempt: CurrentAttempt) -> list[PodObservation]:
        """Return the pods of ``attempt``, without pods that an earlier suspension of the child object deleted."""
        pods = [pod for pod in self.pods if pod.attempt == attempt.number]
        return [pod for pod in pods if not is_of_an_earlier_admission(pod, self.child)]


def is_of_an_earlier_admission(pod: PodObservation, child: ChildObservation | None) -> bool:
    """Return whether the deletion of ``pod`` was requested no later than ``child`` was last resumed.

    Such a pod was deleted by a suspension that is over. It may still terminate, but its end proves no failure of the
    attempt.
    """
    resumed = child.resumed_at if child is not None else None
    return resumed is not None and pod.delete_requested_at is not None and pod.delete_requested_at <= resumed
