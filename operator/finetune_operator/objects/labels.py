"""Labels, annotations and owner references of the objects that the operator creates.

The builders in `objects/` set the labels. `watches.py` finds the job to which a watched object belongs by its labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.api import API_VERSION, GROUP, KIND, FineTuneJob
from finetune_operator.kube.resources import OPERATOR_NAME
from finetune_operator.queue.key import Key

JOB_NAME = f"{GROUP}/job-name"
JOB_UID = f"{GROUP}/job-uid"
ATTEMPT = f"{GROUP}/attempt"
"""Label with the number of the attempt, for example ``"2"``."""
PREFLIGHT = f"{GROUP}/preflight"
"""Label with the number of the try of the preflight check. Preflight pods carry this label instead of ATTEMPT."""
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = OPERATOR_NAME
QUEUE_NAME = "kueue.x-k8s.io/queue-name"
"""Label with the name of the LocalQueue in which Kueue queues a PyTorchJob."""
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
"""Label with the name of a WorkloadPriorityClass of Kueue, copied by the operator from FineTuneJob to PyTorchJob.

A WorkloadPriorityClass is not the PriorityClass of `runPolicy.priorityClassName`. Where the label is absent, Kueue
takes the priority from the pods' PriorityClass."""
LAST_CHECKPOINT_TIME = "volcano.sh/last-checkpoint-time"
"""Annotation of pods with the time of the job's newest checkpoint. A scheduler can then preempt the pods that lose the
least work."""
REPLICA_INDEX = "training.kubeflow.org/replica-index"
"""Label with the index of a worker, set on every pod by training-operator."""
TRAINING_CONTAINER = "pytorch"
"""Name of the training container; PyTorchJob requires exactly this name."""
OWNED_OBJECTS_SELECTOR = JOB_NAME
"""Label selector of the watches on pods and PyTorchJobs. The API server sends only objects that have this label."""


def attempt_labels(job_name: str, job_uid: str, attempt: int) -> dict[str, str]:
    """Return the labels of every object of an attempt."""
    return {JOB_NAME: job_name, JOB_UID: job_uid, ATTEMPT: str(attempt), MANAGED_BY: MANAGER}


def preflight_labels(job_name: str, job_uid: str, number: int) -> dict[str, str]:
    """Return the labels of every object of try ``number`` of the preflight check."""
    return {JOB_NAME: job_name, JOB_UID: job_uid, PREFLIGHT: str(number), MANAGED_BY: MANAGER}


def job_key(namespace: str | None, labels: Mapping[str, str]) -> Key | None:
    """Return the key of the job to which an object with ``labels`` belongs; None where the labels name no job.

    Anybody can label an object, so the label may also have a value that is the name of no possible job.
    """
    return Key.parse(namespace or "", labels.get(JOB_NAME, ""))


def owner_reference(job: FineTuneJob) -> dict[str, Any]:
    """Return the owner reference to ``job``, by which the garbage collector deletes an object after its job.

    `blockOwnerDeletion` is not set, because it needs a permission on finalizers and serves foreground deletion only.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
    }
