"""Creates and deletes the NetworkPolicies of attempts. An installation can switch them off.

`attempt_objects.py` creates the policy of an attempt before the child object, so that no pod of the attempt ever runs
without it, and deletes it with the attempt's ConfigMap. `settled.py` deletes the policy of the last attempt.
"""

from __future__ import annotations

from finetune_core.api.conditions import Reason
from finetune_operator import messages
from finetune_operator.kube.client import ApiError, KubeClient, going_away
from finetune_operator.kube.manifest import Manifest
from finetune_operator.objects.observations import controller_uid
from finetune_operator.queue.retryable import RetryableError


class NetworkPolicies:
    """The NetworkPolicies of attempts, or nothing where the setting `--network-policies` is off."""

    def __init__(self, client: KubeClient, *, enabled: bool) -> None:
        """Send requests with ``client``. Where not ``enabled``, send none: the chart then grants no permission."""
        self._client = client
        self._enabled = enabled

    async def create(self, manifest: Manifest) -> None:
        """Create the NetworkPolicy, or accept the existing one where an earlier reconcile of the job has created it.

        Raises RetryableError where the API server refuses the policy, or where a policy of that name belongs to another
        owner. Raises ApiError (409) where the existing policy is being deleted, so that the job is soon reconciled
        again. The attempt does not start without its policy.
        """
        if not self._enabled:
            return
        metadata = manifest["metadata"]
        try:
            await self._client.create_network_policy(manifest)
        except ApiError as error:
            if not error.is_name_taken:
                if error.is_refusal:
                    message = messages.backend_refused("NetworkPolicy", metadata["name"], error.message)
                    raise RetryableError(Reason.BACKEND_UNAVAILABLE, message) from error
                raise
            existing = await self._client.get_network_policy(metadata["namespace"], metadata["name"])
            if existing is None or "deletionTimestamp" in existing["metadata"]:
                raise going_away(error, "NetworkPolicy", metadata["name"]) from error
            if controller_uid(existing) != controller_uid(manifest):
                problem = messages.name_conflict("NetworkPolicy", metadata["name"])
                raise RetryableError(Reason.NAME_CONFLICT, problem) from error

    async def delete(self, namespace: str, name: str, owner_uid: str) -> None:
        """Delete the NetworkPolicy if it exists and its owner is the job with the uid ``owner_uid``."""
        if not self._enabled:
            return
        existing = await self._client.get_network_policy(namespace, name)
        if existing is not None and controller_uid(existing) == owner_uid:
            await self._client.delete_network_policy(namespace, name, existing["metadata"]["uid"])
