"""Names of the Kubernetes objects that the operator creates for a job.

A name is a pure function of the job and the attempt, so that an operator that restarts after a crash finds the objects
that it has already created.
"""

from __future__ import annotations

import hashlib


def attempt_name(job_name: str, job_uid: str, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob and ConfigMap.

    The name has at most 53 characters (40 + 1 + 8 + 1 + 3). Then `<name>-worker-<2 digits>` fits into the 63 characters
    of a DNS label, which a pod's hostname and a Service's name need. The digest of the uid tells a job from an earlier,
    deleted job of the same name.
    """
    return f"{job_name}-{hashlib.sha256(job_uid.encode()).hexdigest()[:8]}-{attempt}"


def preflight_name(job_name: str, job_uid: str, number: int) -> str:
    """Return the name of the preflight pod and ConfigMap of try ``number``, which differs from every attempt's name."""
    return f"{attempt_name(job_name, job_uid, 0).removesuffix('-0')}-preflight-{number}"


def worker_name(child_name: str, index: int) -> str:
    """Return the name that training-operator gives to a worker's pod and headless Service."""
    return f"{child_name}-worker-{index}"
