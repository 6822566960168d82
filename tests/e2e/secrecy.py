"""Search the cluster for the object store's secret key while the pods of a job run. End-to-end tests call the
function."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.cluster import Cluster


def assert_no_key_leaks(cluster: Cluster, namespace: str, child: str) -> None:
    """Assert that the secret key is in the Secret only, and not in other objects, in logs, or in command lines and
    trainer environments of the machine's processes."""
    secret = cluster.minio.secret_key
    forms = (secret, base64.b64encode(secret.encode()).decode())
    # This assertion shows that the search works, because the Secret contains the key.
    assert forms[1] in cluster.kubectl("get", "secrets", "-n", namespace, "-o", "yaml")
    for kind in ("configmaps", "pods", "pytorchjobs", "finetunejobs", "events"):
        objects = cluster.kubectl("get", kind, "-n", namespace, "-o", "yaml")
        assert not any(form in objects for form in forms), kind
    metadata = [pod["metadata"] for pod in cluster.get("pods", "-n", namespace)["items"]]
    pods = [pod["name"] for pod in metadata if "deletionTimestamp" not in pod]
    assert any(name.startswith(child) for name in pods)
    for name in pods:
        assert secret not in cluster.kubectl("logs", name, "-n", namespace, "--all-containers"), name
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # The process ended during the loop.
        assert secret.encode() not in command, command
        if b"finetune_trainer" in command:
            assert secret.encode() not in environment
