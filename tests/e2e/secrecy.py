"""Looks for the object store's key where it must not be, while the pods of a job run. Called by end-to-end tests."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.cluster import Cluster


def assert_no_key_is_told(cluster: Cluster, namespace: str, child: str) -> None:
    """The access key is in the Secret and nowhere else: objects, logs, arguments, the processes of the machine."""
    secret = cluster.minio.secret_key
    forms = (secret, base64.b64encode(secret.encode()).decode())
    # The search works: where the key belongs it is found.
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
            continue  # it ended while we looked
        assert secret.encode() not in command, command
        if b"finetune_trainer" in command:
            assert secret.encode() not in environment
