"""What one reconcile has read for a job that has not ended, as immutable values. `observer.py` fills them in; the pure
functions of `decide/` and `status/` take them as their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import CheckpointStatus, CurrentAttempt, UsageStatus
from finetune_core.contract import Result
from finetune_operator.objects.observations import ChildObservation, PodObservation


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightObservation:
    """What was read for the preflight check, which runs before attempt 1."""

    enabled: bool = False
    """Whether the job is to be checked: `runPolicy.preflight`, or where the field is absent the operator's default."""
    pods: Sequence[PodObservation] = ()
    """Preflight pods of the job; `PodObservation.index` is the number of the try, counted from 1."""
    problem: str = ""
    """Why the API server refused the pod of the current try when it was last created; empty where it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobObservation:
    """What was read for a job that has not ended."""

    now: datetime
    nodes: int
    """`spec.resources.nodes`: the number of pods of an attempt."""
    policy: RunPolicySpec
    child: ChildObservation | None
    """The backend's object (PyTorchJob) of the newest attempt, whether that attempt goes on or has ended."""
    child_uid: str
    """Uid that the status recorded for the current attempt's child; empty where no child was seen yet, and between
    attempts."""
    pods: Sequence[PodObservation]
    """Pods of every attempt that still exist."""
    checkpoints: Sequence[CheckpointStatus]
    """Committed checkpoints as the stored status lists them, oldest first."""
    usage: UsageStatus
    """GPU seconds and active seconds of the job until `now`."""
    waiting_for: str
    """Why not all pods of the attempt run, for example "pod a-worker-0: 0/3 nodes are available"; empty where all
    run."""
    final_result: Result | None
    """The trainer's result from the newest report of the current attempt; None before the final report."""
    last_phase: str = ""
    """Phase of the trainer in the newest report of the current attempt, for example "Training"; empty without one."""
    warning: str = ""
    """Newest warning event about a pod that does not start, for example "FailedMount: secret x not found"."""
    preflight: PreflightObservation = field(default_factory=PreflightObservation)

    @property
    def held(self) -> bool:
        """Whether the child is suspended: a queue such as Kueue has not admitted the attempt."""
        return self.child is not None and self.child.suspended

    def pods_of(self, attempt: CurrentAttempt) -> list[PodObservation]:
        """Return the pods of ``attempt`` without those that an earlier suspension of its child has deleted."""
        pods = [pod for pod in self.pods if pod.attempt == attempt.number]
        return [pod for pod in pods if not is_of_an_earlier_admission(pod, self.child)]


def is_of_an_earlier_admission(pod: PodObservation, child: ChildObservation | None) -> bool:
    """Return whether a suspension that is over deleted ``pod``. Such a pod still terminates, but proves no failure."""
    resumed = child.resumed_at if child is not None else None
    return resumed is not None and pod.delete_requested_at is not None and pod.delete_requested_at <= resumed
