"""The backend that runs an attempt as a Kubeflow PyTorchJob.

The PyTorchJob has Worker replicas and no Master replica, for two reasons. With a Master, training-operator would add an
init container, whose image does not work in `restricted` namespaces and air-gapped clusters. Without a Master,
training-operator counts the PyTorchJob as succeeded only when every worker has succeeded. The workers find rank 0 by
the address that the pod template sets. The retries, deadline and TTL of PyTorchJob are not used, because the operator
has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.api import FineTuneJob
from finetune_core.api.conditions import Reason
from finetune_core.names import worker_name
from finetune_operator import messages
from finetune_operator.kube.api_errors import ApiError, going_away
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.resources import PYTORCHJOBS
from finetune_operator.objects.labels import QUEUE_NAME, QUEUE_PRIORITY, attempt_labels, owner_reference
from finetune_operator.objects.observations import ChildObservation, controller_uid, parse_time
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from finetune_operator.queue.retryable import RetryableError

KIND = "PyTorchJob"


def build_pytorchjob(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    """Return the PyTorchJob of an attempt."""
    resources = job.spec.resources
    labels = attempt_labels(job.metadata.name, job.metadata.uid, attempt.number)
    if queue := job.spec.run_policy.queue_name:
        labels[QUEUE_NAME] = queue
    if priority := job.metadata.labels.get(QUEUE_PRIORITY):
        labels[QUEUE_PRIORITY] = priority
    return {
        "apiVersion": PYTORCHJOBS.api_version,
        "kind": KIND,
        "metadata": {
            "name": attempt.name,
            "namespace": job.metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            # The value is a string, because the CRD of PyTorchJob requires a string. The string is a number and not
            # `auto`, because with `auto` the node would decide the number of processes.
            "nprocPerNode": str(resources.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": resources.nodes,
                    "restartPolicy": "Never",
                    "template": pod_template(job, attempt),
                }
            },
        },
    }


def parse_pytorchjob(manifest: Mapping[str, Any]) -> ChildObservation:
    """Return what the operator needs to know about the PyTorchJob ``manifest``, which anybody may have created.

    ``manifest`` may have no spec, because the CRD of PyTorchJobs does not require a spec.
    """
    metadata, spec = manifest["metadata"], manifest.get("spec", {})
    conditions = {item["type"]: item for item in manifest.get("status", {}).get("conditions") or []}

    def condition_if(kind: str, status: str) -> Mapping[str, Any]:
        """Return the PyTorchJob's condition of type ``kind`` if its status is ``status``, else an empty mapping."""
        condition = conditions.get(kind, {})
        return condition if condition.get("status") == status else {}

    end = condition_if("Failed", "True") or condition_if("Succeeded", "True")
    return ChildObservation(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller_uid(manifest),
        deleting="deletionTimestamp" in metadata,
        suspended=bool(spec.get("runPolicy", {}).get("suspend") or condition_if("Suspended", "True")),
        resumed_at=parse_time(condition_if("Suspended", "False").get("lastTransitionTime")),
        replicas=spec.get("pytorchReplicaSpecs", {}).get("Worker", {}).get("replicas", 1),
        succeeded=bool(condition_if("Succeeded", "True")),
        failed=bool(condition_if("Failed", "True")),
        failed_at=parse_time(condition_if("Failed", "True").get("lastTransitionTime")),
        message=end.get("message", ""),
    )


class PyTorchJobBackend:
    """Implements the interface `Backend` with PyTorchJobs."""

    kind = KIND
    api_version = PYTORCHJOBS.api_version

    def __init__(self, client: KubeClient) -> None:
        """Send every request with ``client``."""
        self._client = client

    def pod_name(self, child: str, index: int) -> str:
        """Return the name that training-operator gives to the pod of worker ``index`` of the PyTorchJob ``child``."""
        return worker_name(child, index)

    def build(self, job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
        """Return the PyTorchJob of an attempt."""
        return build_pytorchjob(job, attempt)

    async def create(self, manifest: Manifest) -> ChildObservation:
        """Create the PyTorchJob ``manifest`` and return it, or return an existing one of this name if the job owns it.

        Raises RetryableError where a PyTorchJob of that name has another owner, where the API server refuses the
        PyTorchJob, or where the CRD of PyTorchJobs is missing. Raises ApiError (409) where the existing PyTorchJob is
        being deleted or has just been deleted, so that the job is soon reconciled again.
        """
        name = manifest["metadata"]["name"]
        try:
            return parse_pytorchjob(await self._client.create_child(manifest))
        except ApiError as error:
            if not error.is_name_taken:
                raise _creation_error(error, name) from error
            conflict = error
        existing = await self.observe(manifest["metadata"]["namespace"], name)
        if existing is None or existing.deleting:
            raise going_away(conflict, KIND, name)
        if existing.owner_uid != controller_uid(manifest):
            raise RetryableError(Reason.NAME_CONFLICT, messages.name_conflict(self.kind, name))
        return existing

    async def observe(self, namespace: str, name: str) -> ChildObservation | None:
        """Return the PyTorchJob as the API server has it, or None where it does not exist."""
        manifest = await self._client.get_child(namespace, name)
        return parse_pytorchjob(manifest) if manifest else None

    async def delete(self, namespace: str, child: ChildObservation) -> None:
        """Delete the PyTorchJob ``child``, identified by name and uid."""
        await self._client.delete_child(namespace, child.name, child.uid)


def _creation_error(error: ApiError, name: str) -> Exception:
    """Return a RetryableError where the CRD is missing or the PyTorchJob is refused; otherwise ``error`` itself."""
    if error.is_not_found and not error.reason:
        # The CRD is missing: the API server answers an unknown kind with the plain text "404 page not found". Where
        # only the namespace is missing, the answer has a reason.
        return RetryableError(Reason.BACKEND_UNAVAILABLE, messages.backend_missing())
    if error.is_refusal:
        return RetryableError(Reason.BACKEND_UNAVAILABLE, messages.backend_refused(KIND, name, error.message))
    return error
