"""Finds out which of the pods with a job's labels are the job's own, because anybody may copy labels.

Pure functions on what the API server has sent. `observer.py`, `settled.py` and `act/preflight_objects.py` call these
functions, so that no other pod changes a decision, adds to the used GPU time, may report, or is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_core.api.status import FineTuneJobStatus
from finetune_core.names import attempt_name
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.backends.interface import Backend
from finetune_operator.objects.observations import (
    ChildObservation,
    PodObservation,
    controller_of,
    controller_uid,
    parse_pod,
    parse_preflight_pod,
    whole_number,
)
from finetune_operator.observe.stored_job import StoredJob


def pods_of_attempts(
    manifests: Iterable[Manifest], job: StoredJob, backend: Backend, found: ChildObservation | None
) -> list[PodObservation]:
    """Return the pods in ``manifests`` that belong to an attempt of ``job``.

    A pod belongs to an attempt if it has the name that ``backend`` gives to the pod of its index, and if its controller
    is the child of the attempt. Where the status records the uid of that child, the controller must have this uid.
    Otherwise the controller's name decides, because the name of a child contains a digest of the job's uid. ``found``
    is the object that now has the name of the newest child; None where no object has this name. Where ``found`` has
    another owner than the job, the pods of ``found`` do not belong to the job.

    A pod without a controller belongs to its attempt where the status records the uid of the pod: somebody deleted the
    child and kept its pods (`--cascade=orphan`).
    """
    pods = ((parse_pod(manifest), manifest) for manifest in manifests)
    return [pod for pod, manifest in pods if pod is not None and _is_own(pod, manifest, job, backend, found)]


def preflight_pods(manifests: Iterable[Manifest], job: StoredJob) -> list[PodObservation]:
    """Return the preflight pods in ``manifests`` whose controller is ``job``."""
    own = (manifest for manifest in manifests if controller_uid(manifest) == job.uid)
    return [pod for manifest in own if (pod := parse_preflight_pod(manifest)) is not None]


def orphans_of_ended(manifests: Iterable[Manifest], job: StoredJob, backend: Backend) -> list[PodObservation]:
    """Return the pods in ``manifests`` that the last attempt of ``job``, which has ended, left without an owner.

    The status of an ended job records no pods any more. So a pod counts if its name is the name of a pod of that
    attempt and it was created before the job ended. Such a name contains a digest of the job's uid. Pods that are being
    deleted already are left out.
    """
    ended, started = job.ended_at, job.status.attempts.started
    child = attempt_name(job.key.name, job.uid, started)
    alone = (parse_pod(manifest) for manifest in manifests if not manifest["metadata"].get("ownerReferences"))
    return [
        pod
        for pod in alone
        if pod is not None
        and (pod.attempt, pod.name) == (started, backend.pod_name(child, pod.index))
        and ended is not None
        and pod.created_at <= ended
        and pod.delete_deadline is None
    ]


def newest_attempt(manifests: Iterable[Manifest], job: StoredJob, backend: Backend) -> int:
    """Return the highest number of an attempt of ``job`` whose child has left a trace; 0 where there is none.

    A trace is the child's name, in `status.child` or in the owner reference of a pod in ``manifests``. The name of a
    child contains the number of its attempt and a digest of the job's uid.
    """
    named = set() if job.status.child is None else {job.status.child.name}
    numbers = {0, *(whole_number(name.rpartition("-")[2]) or 0 for name in named)}
    for manifest in manifests:
        pod, owner = parse_pod(manifest), controller_of(manifest)
        if pod is not None and owner is not None and owner["kind"] == backend.kind:
            numbers.add(pod.attempt)
            named.add(owner["name"])
    return max(number for number in numbers if number == 0 or attempt_name(job.key.name, job.uid, number) in named)


def _is_own(
    pod: PodObservation, manifest: Manifest, job: StoredJob, backend: Backend, found: ChildObservation | None
) -> bool:
    child = attempt_name(job.key.name, job.uid, pod.attempt)
    if not 1 <= pod.attempt <= job.status.attempts.started or pod.name != backend.pod_name(child, pod.index):
        return False
    owner = controller_of(manifest)
    if owner is None:
        return pod.uid in _recorded_pods(job.status)
    if (owner["apiVersion"], owner["kind"], owner["name"]) != (backend.api_version, backend.kind, child):
        return False
    if recorded := _recorded_child(job.status, pod.attempt):
        return bool(owner["uid"] == recorded)
    if found is not None and found.name == child:
        return bool(owner["uid"] == found.uid and found.owner_uid == job.uid)
    return True


def _recorded_child(status: FineTuneJobStatus, attempt: int) -> str:
    """Return the uid that the status records for the child of ``attempt``; empty where it records none."""
    current = status.attempts.current
    is_current = current is not None and current.number == attempt
    return status.child.uid if is_current and status.child is not None else ""


def _recorded_pods(status: FineTuneJobStatus) -> set[str]:
    """Return the uids of all pods that the status records: pods of the current attempt, and pods that hold GPUs."""
    current = status.attempts.current
    holders = status.usage.holders if status.usage is not None else []
    return {*holders, *(record.uid for record in (current.pods if current is not None else []))}
