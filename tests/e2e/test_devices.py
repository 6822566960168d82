"""Each pod of a job with `gpusPerNode: 2` gets two GPUs that no other pod has, and is placed on a node with the GPU
product that the job asks for."""

from __future__ import annotations

import pytest

from examples.demo import steps
from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name, worker_name
from tests.cluster import Cluster
from tests.e2e.jobs import MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_pods_get_the_gpus_that_they_ask_for(installed: Cluster, namespace: str, tiny_job: MakeJob) -> None:
    manifest = tiny_job("devices", spec__resources__gpusPerNode=2, spec__training__maxSteps=400)
    steps.apply(installed, manifest, namespace)
    job = steps.wait_for_condition(installed, namespace, "devices", ConditionType.RUNNING, timeout=300)
    child = attempt_name("devices", job.metadata.uid, 1)
    devices: set[str] = set()
    for index in range(2):
        pod = worker_name(child, index)
        asked = installed.get("pod", pod, "-n", namespace)["spec"]
        assert asked["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
        assert asked["nodeSelector"]["nvidia.com/gpu.product"] == "NVIDIA-A100-SXM4-80GB"
        shown = installed.kubectl(
            "exec", pod, "-n", namespace, "-c", "pytorch", "--", "printenv", "NVIDIA_VISIBLE_DEVICES"
        )
        devices |= set(shown.strip().split(","))
    assert len(devices) == 4
    node = installed.kubectl("describe", "nodes")
    assert "nvidia.com/gpu" in node
    steps.delete_job(installed, namespace, "devices")
