"""Creates and deletes the ConfigMaps with the run file: one for each attempt, and one for each try of the preflight
check.

`attempt_objects.py` and `preflight_objects.py` create a ConfigMap before the object that mounts it (child object or
preflight pod), and delete both together. `settled.py` calls `delete_config_map` after the job has ended.
"""

from __future__ import annotations

from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient, going_away
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.observations import controller_uid
from finetune_operator.queue.retryable import RetryableError


async def create_config_map(client: KubeClient, manifest: Manifest) -> None:
    """Create the ConfigMap, or accept the existing one where an earlier reconcile of the same job has created it.

    Raises RetryableError where the API server refuses the ConfigMap, or where a ConfigMap of that name belongs to
    another owner. Raises ApiError (409) where the existing ConfigMap is being deleted, so that the job is soon
    reconciled again.
    """
    metadata = manifest["metadata"]
    try:
        await client.create_config_map(manifest)
    except ApiError as error:
        if not error.is_name_taken:
            if error.is_refusal:
                message = messages.backend_refused("ConfigMap", metadata["name"], error.message)
                raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await client.get_config_map(metadata["namespace"], metadata["name"])
        if existing is None or "deletionTimestamp" in existing["metadata"]:
            raise going_away(error, "ConfigMap", metadata["name"]) from error
        if controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict("ConfigMap", metadata["name"])
            raise RetryableError(Reason.NAME_CONFLICT, problem) from error


async def delete_config_map(client: KubeClient, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and its owner is the job with the uid ``owner_uid``."""
    existing = await client.get_config_map(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await client.delete_config_map(namespace, name, existing["metadata"]["uid"])
