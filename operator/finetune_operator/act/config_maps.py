"""Creates and deletes the ConfigMaps with the run file: one for each attempt, and one for each try of the preflight
check.

`attempt_objects.py` creates a ConfigMap before the child object whose pods mount it, and `preflight_objects.py` before
the preflight pod. Both modules delete the ConfigMap together with child object or preflight pod, or else before the
objects of the next attempt or try are created. `settled.py` calls `delete_config_map` after the job has ended.
"""

from __future__ import annotations

from finetune_operator.act.owned_objects import create_owned, delete_owned
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest


async def create_config_map(client: KubeClient, manifest: Manifest) -> None:
    """Create the ConfigMap ``manifest``, or accept the existing ConfigMap of this name if the same job owns it.

    Raises the errors of `create_owned`.
    """
    await create_owned(manifest, client.create_config_map, client.get_config_map)


async def delete_config_map(client: KubeClient, namespace: str, name: str, owner_uid: str) -> None:
    """Delete the ConfigMap if it exists and its owner is the job with the uid ``owner_uid``."""
    await delete_owned(namespace, name, owner_uid, client.get_config_map, client.delete_config_map)
