"""Names of the objects that the operator makes for a job: a pure function of job and attempt, so that a crash
after any write finds what it made."""

from __future__ import annotations

import hashlib


def attempt_name(job_name: str, job_uid: str, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob and ConfigMap.

    At most 53 characters (40 + 1 + 8 + 1 + 3): `<name>-worker-<2 digits>` then fits the 63 of a DNS label, which
    a pod's hostname and Service need. The uid's digest keeps a job apart from an earlier one of the same name.
    """
    return f"{job_name}-{hashlib.sha256(job_uid.encode()).hexdigest()[:8]}-{attempt}"


def preflight_name(job_name: str, job_uid: str, number: int) -> str:
    """Return the name of try ``number``'s preflight pod and ConfigMap: apart from every attempt's."""
    return f"{attempt_name(job_name, job_uid, 0).removesuffix('-0')}-preflight-{number}"


def worker_name(child_name: str, index: int) -> str:
    """Return the name that training-operator gives to a worker's pod and headless Service."""
    return f"{child_name}-worker-{index}"
