"""Creates and deletes the ConfigMaps of attempts and of tries of the preflight check, which carry the run file.

`attempt_objects.py` and `preflight_objects.py` call these functions before they create a child object or a pod.
`settled.py` calls `delete_config_map` after the job has ended.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.observations import controller_uid
from finetune_operator.queue.retryable import RetryableError

_REFUSALS: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY})


async def create_config_map(client: KubeClient, manifest: Manifest) -> None:
    """Create the ConfigMap, or accept the ConfigMap that an earlier try has created.

    Raises RetryableError where the API server refuses the ConfigMap or where another object has its name.
    """
    metadata = manifest["metadata"]
    try:
        await client.create_config_map(manifest)
    except ApiError as error:
        if not error.is_conflict:
            if error.status in _REFUSALS:
                message = messages.backend_refused("ConfigMap", metadata["name"], error.message)
                raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await client.get_config_map(metadata["namespace"], metadata["name"])
        if existing is not None and controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict("ConfigMap", metadata["name"])
            raise RetryableError(Reason.NAME_CONFLICT, problem) from error


async def delete_config_map(client: KubeClient, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and its controller is the job with ``owner_uid``."""
    existing = await client.get_config_map(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await client.delete_config_map(namespace, name)
