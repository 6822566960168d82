"""Search a cluster for places into which the object store's secret key has leaked, while the pods of a job run."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.cluster import Cluster


def assert_no_key_leaks(cluster: Cluster, namespace: str, child: str) -> None:
    """Assert that a Secret of ``namespace`` holds the object store's secret key, and that the key is in none of these
    places: the ConfigMaps, pods, PyTorchJobs, FineTuneJobs, events and pod logs of the namespace, the command lines of
    all processes, and the environments of the trainer's processes.

    The pods of ``child``, a job's PyTorchJob, must be running.
    """
    secret = cluster.minio.secret_key
    forms = (secret, base64.b64encode(secret.encode()).decode())
    # The key must be found in the Secret. If it is not, the searches below look for a wrong text, and would find
    # nothing even if the key had leaked.
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
            continue  # The process has ended, or it may not be read.
        assert secret.encode() not in command, command
        if b"finetune_trainer" in command:
            assert secret.encode() not in environment
