"""Names of the Kubernetes objects that the operator and training-operator create for a job.

Each name is computed from the job and from the number of the attempt or of the try. An operator that restarts after a
crash therefore finds the objects that it has already created.
"""

from __future__ import annotations

import hashlib


def attempt_name(job_name: str, job_uid: str, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob, ConfigMap and NetworkPolicy.

    The name has at most 53 characters (40 + 1 + 8 + 1 + 3). So `<name>-worker-<2 digits>`, the name of a pod and of its
    Service, fits into the 63 characters of a DNS label. The name contains a digest of ``job_uid``, so that the objects
    of a job and those of an earlier, deleted job with the same ``job_name`` have different names.
    """
    return f"{job_name}-{hashlib.sha256(job_uid.encode()).hexdigest()[:8]}-{attempt}"


def preflight_name(job_name: str, job_uid: str, number: int) -> str:
    """Return the name of the pod and of the ConfigMap of try ``number`` of the preflight check. The objects of attempts
    never have this name."""
    return f"{attempt_name(job_name, job_uid, 0).removesuffix('-0')}-preflight-{number}"


def worker_name(child_name: str, index: int) -> str:
    """Return the name that training-operator gives to the pod and to the headless Service of worker ``index``."""
    return f"{child_name}-worker-{index}"
