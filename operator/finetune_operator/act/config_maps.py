"""Creates and deletes the ConfigMaps of attempts and of tries of the preflight check, which carry the run file.

`attempt_objects.py` and `preflight_objects.py` call these functions before they create a pod or a child. `settled.py`
calls them after the job has ended.
"""

from __future__ import annotations

from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.cluster import ApiError, Cluster, Manifest
from finetune_operator.objects.observed import controller_uid
from finetune_operator.queue.problems import OutsideError


async def create_config_map(cluster: Cluster, manifest: Manifest) -> None:
    """Create the ConfigMap, or accept the one that an earlier try created.

    Raises OutsideError where the API server refuses it, or where an object of another owner has its name.
    """
    metadata = manifest["metadata"]
    try:
        await cluster.create_config_map(manifest)
    except ApiError as error:
        if error.status != 409:
            if error.status in (400, 403, 422):
                message = messages.backend_refused("ConfigMap", metadata["name"], error.message)
                raise OutsideError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await cluster.get_config_map(metadata["namespace"], metadata["name"])
        if existing is not None and controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict("ConfigMap", metadata["name"])
            raise OutsideError(Reason.NAME_CONFLICT, problem) from error


async def remove_config_map(cluster: Cluster, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and the job with ``owner_uid`` controls it."""
    existing = await cluster.get_config_map(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await cluster.delete_config_map(namespace, name)
