"""Kubeflow's PyTorchJob as backend: worker replicas only, with a static rendezvous that the template supplies.

Without a Master training-operator adds no init container (whose image breaks `restricted` and air-gapped
clusters) and counts the job as succeeded only when every worker is. Its own retries, deadline and TTL stay unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_core.api import FineTuneJob
from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient, Manifest
from finetune_operator.objects.labels import QUEUE_NAME, QUEUE_PRIORITY, attempt_labels, owner_reference
from finetune_operator.objects.observations import ChildObservation, controller_uid, parse_time
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from finetune_operator.queue.retryable import RetryableError


def build_pytorchjob(job: FineTuneJob, plan: AttemptSpec) -> Manifest:
    """Return the PyTorchJob of an attempt."""
    resources = job.spec.resources
    labels = attempt_labels(job.metadata.name, job.metadata.uid, plan.number)
    if queue := job.spec.run_policy.queue_name:
        labels[QUEUE_NAME] = queue
    if priority := job.metadata.labels.get(QUEUE_PRIORITY):
        labels[QUEUE_PRIORITY] = priority
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {
            "name": plan.name,
            "namespace": job.metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            # A string on purpose: the schema refuses a number, and `auto` would ask the node.
            "nprocPerNode": str(max(1, resources.gpus_per_node)),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": resources.nodes,
                    "restartPolicy": "Never",
                    "template": pod_template(job, plan),
                }
            },
        },
    }


def parse_pytorchjob(manifest: Mapping[str, Any]) -> ChildObservation:
    """Return the observation of a PyTorchJob."""
    metadata, spec = manifest["metadata"], manifest["spec"]
    conditions = {item["type"]: item for item in manifest.get("status", {}).get("conditions") or []}

    def when(kind: str, status: str) -> Mapping[str, Any]:
        condition = conditions.get(kind, {})
        return condition if condition.get("status") == status else {}

    end = when("Failed", "True") or when("Succeeded", "True")
    return ChildObservation(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller_uid(manifest),
        deleting="deletionTimestamp" in metadata,
        suspended=bool(spec.get("runPolicy", {}).get("suspend") or when("Suspended", "True")),
        resumed_at=parse_time(when("Suspended", "False").get("lastTransitionTime")),
        replicas=spec.get("pytorchReplicaSpecs", {}).get("Worker", {}).get("replicas", 1),
        succeeded=bool(when("Succeeded", "True")),
        failed=bool(when("Failed", "True")),
        failed_at=parse_time(when("Failed", "True").get("lastTransitionTime")),
        message=end.get("message", ""),
    )


class PyTorchJobBackend:
    """Creates, observes and deletes PyTorchJobs."""

    kind = "PyTorchJob"

    def __init__(self, cluster: KubeClient) -> None:
        """Use ``cluster`` for every request."""
        self._cluster = cluster

    def build(self, job: FineTuneJob, plan: AttemptSpec) -> Manifest:
        """Return the PyTorchJob of an attempt."""
        return build_pytorchjob(job, plan)

    async def create(self, manifest: Manifest) -> ChildObservation:
        """Create the PyTorchJob. A 409 means an earlier try did, or somebody else owns the name."""
        name = manifest["metadata"]["name"]
        try:
            return parse_pytorchjob(await self._cluster.create_child(manifest))
        except ApiError as error:
            if error.status != 409:
                raise _create_problem(error, name) from error
        namespace, owner = manifest["metadata"]["namespace"], controller_uid(manifest)
        existing = await self.observe(namespace, name)
        if existing is None:
            raise ApiError(409, "Conflict", f"PyTorchJob {name} was deleted while it was created")
        if existing.owner_uid != owner:
            raise RetryableError(Reason.NAME_CONFLICT, messages.name_conflict(self.kind, name))
        return existing

    async def observe(self, namespace: str, name: str) -> ChildObservation | None:
        """Return the PyTorchJob as it is, or None."""
        manifest = await self._cluster.get_child(namespace, name)
        return parse_pytorchjob(manifest) if manifest else None

    async def delete(self, namespace: str, child: ChildObservation) -> None:
        """Delete exactly this PyTorchJob."""
        await self._cluster.delete_child(namespace, child.name, child.uid)


def _create_problem(error: ApiError, name: str) -> Exception:
    """Return what stands in the way: a missing kind, a webhook, a policy; or the error where it is the server's."""
    if error.status == 404 and not error.reason:
        # The server's plain "404 page not found": it does not know the kind. A missing namespace has a reason.
        return RetryableError(Reason.BACKEND_UNAVAILABLE, messages.backend_missing())
    if error.is_refusal:
        message = messages.backend_refused("PyTorchJob", name, error.message)
        return RetryableError(Reason.BACKEND_UNAVAILABLE, message)
    return error
