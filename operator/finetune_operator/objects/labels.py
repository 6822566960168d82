"""Labels and owner of the objects that the operator makes, and how a watched object leads back to its job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.api import API_VERSION, GROUP, KIND, FineTuneJob
from finetune_operator.queue.work_queue import Key

JOB_NAME = f"{GROUP}/job-name"
JOB_UID = f"{GROUP}/job-uid"
ATTEMPT = f"{GROUP}/attempt"
PREFLIGHT = f"{GROUP}/preflight"
"""On preflight pods, in the place of an attempt's number: the number of the try."""
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"
QUEUE_NAME = "kueue.x-k8s.io/queue-name"
"""Kueue's queue of a PyTorchJob."""
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
"""Kueue's WorkloadPriorityClass, taken over from the FineTuneJob's own label. It is another kind than the PriorityClass
of `runPolicy.priorityClassName`, which Kueue reads from the pods' template where there is no such label."""
LAST_CHECKPOINT_TIME = "volcano.sh/last-checkpoint-time"
"""Annotation of pods by which schedulers choose whom to preempt."""
REPLICA_INDEX = "training.kubeflow.org/replica-index"
"""Set by training-operator on every pod."""
TRAINING_CONTAINER = "pytorch"
"""The container name that PyTorchJob requires."""
OWNED_OBJECTS_SELECTOR = JOB_NAME
"""Server-side selector of the watches on pods and PyTorchJobs: only objects that carry the label."""


def attempt_labels(job_name: str, job_uid: str, attempt: int) -> dict[str, str]:
    """Return the labels of everything that belongs to an attempt."""
    return {JOB_NAME: job_name, JOB_UID: job_uid, ATTEMPT: str(attempt), MANAGED_BY: MANAGER}


def preflight_labels(job_name: str, job_uid: str, number: int) -> dict[str, str]:
    """Return the labels of everything that belongs to a try of the preflight check."""
    return {JOB_NAME: job_name, JOB_UID: job_uid, PREFLIGHT: str(number), MANAGED_BY: MANAGER}


def job_key(namespace: str | None, labels: Mapping[str, str]) -> Key | None:
    """Return the key of the job that a labelled object belongs to."""
    name = labels.get(JOB_NAME)
    return Key(namespace, name) if namespace and name else None


def owner_reference(job: FineTuneJob) -> dict[str, Any]:
    """Return the reference that lets the garbage collector follow the job.

    Without blockOwnerDeletion: that would need a permission on finalizers, for foreground deletion only.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
    }
