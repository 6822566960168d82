"""The ConfigMap of an attempt: run file and CA bundle. Immutable, created before the child, owned by the job; it goes
before the child does, or before the next attempt's is created."""

from __future__ import annotations

from pathlib import PurePosixPath

from finetune_core.api import FineTuneJob
from finetune_core.api.conditions import Reason
from finetune_core.contract import CA_FILE, RUN_FILE, RunConfig
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient, Manifest
from finetune_operator.objects.labels import attempt_labels, owner_reference
from finetune_operator.objects.observations import controller_uid
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.queue.retryable import RetryableError


def build_config_map(job: FineTuneJob, plan: AttemptSpec, config: RunConfig, ca_bundle: str) -> Manifest:
    """Return the ConfigMap of an attempt."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": plan.name,
            "namespace": job.metadata.namespace,
            "labels": attempt_labels(job.metadata.name, job.metadata.uid, plan.number),
            "ownerReferences": [owner_reference(job)],
        },
        "immutable": True,
        "data": {
            PurePosixPath(RUN_FILE).name: config.to_json(),
            PurePosixPath(CA_FILE).name: ca_bundle,
        },
    }


async def create_config_map(cluster: KubeClient, manifest: Manifest) -> None:
    """Create the ConfigMap, or accept the one of an earlier try; raises RetryableError where it can't be."""
    metadata = manifest["metadata"]
    try:
        await cluster.create_config_map(manifest)
    except ApiError as error:
        if error.status != 409:
            if error.status in (400, 403, 422):
                message = messages.backend_refused("ConfigMap", metadata["name"], error.message)
                raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await cluster.get_config_map(metadata["namespace"], metadata["name"])
        if existing is not None and controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict("ConfigMap", metadata["name"])
            raise RetryableError(Reason.NAME_CONFLICT, problem) from error


async def delete_config_map(cluster: KubeClient, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and belongs to the job with ``owner_uid``."""
    existing = await cluster.get_config_map(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await cluster.delete_config_map(namespace, name)
