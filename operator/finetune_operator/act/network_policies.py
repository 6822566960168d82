"""Creates and deletes the NetworkPolicies of attempts. An installation can do without these policies.

`attempt_objects.py` creates the policy of an attempt before the child object, so that no pod of the attempt starts
without the policy. The same module deletes the policy together with the attempt's ConfigMap. `settled.py` deletes the
policy of the last attempt.
"""

from __future__ import annotations

from finetune_operator.act.owned_objects import create_owned, delete_owned
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest


class NetworkPolicies:
    """Creates and deletes NetworkPolicies; does nothing where the setting `--network-policies` is off."""

    def __init__(self, client: KubeClient, *, enabled: bool) -> None:
        """Send requests with ``client``. Where ``enabled`` is False no request is sent, because the chart then grants
        no permission."""
        self._client = client
        self._enabled = enabled

    async def create(self, manifest: Manifest) -> None:
        """Create the NetworkPolicy ``manifest``, or accept the existing one of this name if the same job owns it.

        Raises the errors of `create_owned`, so that the attempt does not start without its policy.
        """
        if self._enabled:
            await create_owned(manifest, self._client.create_network_policy, self._client.get_network_policy)

    async def delete(self, namespace: str, name: str, owner_uid: str) -> None:
        """Delete the NetworkPolicy if it exists and its owner is the job with the uid ``owner_uid``."""
        if self._enabled:
            get, delete = self._client.get_network_policy, self._client.delete_network_policy
            await delete_owned(namespace, name, owner_uid, get, delete)
