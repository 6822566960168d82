"""Creates and deletes objects of any kind that belong to a job and whose names are deterministic.

`config_maps.py` and `network_policies.py` call the two functions with the requests for their kind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.api_errors import ApiError, going_away
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.observations import controller_uid
from finetune_operator.queue.retryable import RetryableError

Create = Callable[[Manifest], Awaitable[Manifest]]
"""A request that creates an object."""
Get = Callable[[str, str], Awaitable[Manifest | None]]
"""A request that returns the object with the given namespace and name, or None where no such object exists."""
Delete = Callable[[str, str, str], Awaitable[None]]
"""A request that deletes the object with the given namespace, name and uid."""


async def create_owned(manifest: Manifest, create: Create, get: Get) -> None:
    """Create the object ``manifest``, or accept an existing object of the same name and owner.

    An existing object with that owner comes from an earlier reconcile of the same job. ``create`` and ``get`` send the
    requests for the kind of the object. Raises RetryableError where the API server refuses the object, or where an
    object of that name belongs to another owner. Raises ApiError (409) where the existing object is being deleted or
    has just been deleted, so that the job is soon reconciled again. Raises any other ApiError that the API server
    answers.
    """
    kind, metadata = manifest["kind"], manifest["metadata"]
    try:
        await create(manifest)
    except ApiError as error:
        if not error.is_name_taken:
            if error.is_refusal:
                message = messages.backend_refused(kind, metadata["name"], error.message)
                raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
            raise
        existing = await get(metadata["namespace"], metadata["name"])
        if existing is None or "deletionTimestamp" in existing["metadata"]:
            raise going_away(error, kind, metadata["name"]) from error
        if controller_uid(existing) != controller_uid(manifest):
            problem = messages.name_conflict(kind, metadata["name"])
            raise RetryableError(Reason.NAME_CONFLICT, problem) from error


async def delete_owned(namespace: str, name: str, owner_uid: str, get: Get, delete: Delete) -> None:
    """Delete the object ``namespace/name`` if it exists and its owner is the job with the uid ``owner_uid``.

    ``get`` and ``delete`` send the requests for the kind of the object.
    """
    existing = await get(namespace, name)
    if existing is not None and controller_uid(existing) == owner_uid:
        await delete(namespace, name, existing["metadata"]["uid"])
