"""A second node behaves like a machine of its own: its pods and those of the first node reach each other until the
connection is cut, and no process is left after the node is stopped."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, cgroups, wait_for
from tests.cluster.layout import FIRST_NODE, SECOND_NODE
from tests.cluster.oci import BUSYBOX_IMAGE
from tests.cluster.second_node import TOLERATION, SecondNode

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SERVE = "while :; do echo here | nc -l -p 8000; done"


@pytest.fixture(scope="module")
def second(cluster: Cluster) -> Iterator[SecondNode]:
    node = cluster.second_node()
    yield node
    node.stop()
    cluster.kubectl("delete", "node", node.name)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    wait_for("the service account", lambda: "default" in cluster.kubectl("get", "serviceaccounts", "-n", name), 20)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def pods(cluster: Cluster, second: SecondNode, namespace: str) -> dict[str, str]:
    """The IP addresses of two pods with a server on port 8000, one pod on each node, by the name of the node."""
    addresses = {}
    for node in (FIRST_NODE.name, second.name):
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(serving(node)))
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{node}", "-n", namespace, "--timeout=60s")
        addresses[node] = cluster.get("pod", node, "-n", namespace)["status"]["podIP"]
    return addresses


def serving(node: str) -> dict[str, Any]:
    container = {"name": "main", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", SERVE]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": node},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [TOLERATION],
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
        },
    }


def answer(cluster: Cluster, namespace: str, node: str, script: str) -> str:
    """Run a shell script in the pod on ``node`` with `kubectl exec`, and return what it prints."""
    shell = ["exec", node, "-n", namespace, "--", "sh", "-c", script]
    return cluster.kubectl(*shell).strip()


def test_pods_of_both_nodes_reach_each_other_and_the_services(
    cluster: Cluster, namespace: str, pods: dict[str, str]
) -> None:
    first, second = FIRST_NODE.name, SECOND_NODE.name
    assert pods[first].startswith("10.244.0.")
    assert pods[second].startswith("10.244.1.")
    for here, there in ((first, second), (second, first)):
        assert answer(cluster, namespace, here, f"nc -w 5 {pods[there]} 8000 </dev/null") == "here"
    store = f"{cluster.minio.in_cluster_endpoint}/minio/health/live"
    assert answer(cluster, namespace, second, f"wget -q -O - {store} && echo stored") == "stored"
    assert answer(cluster, namespace, second, "nc -w 3 192.0.2.1 443 </dev/null 2>/dev/null || echo out") == "out"


def test_only_pods_that_tolerate_it_are_placed_on_a_reserved_node(cluster: Cluster, second: SecondNode) -> None:
    taints = cluster.get("node", second.name)["spec"]["taints"]
    assert [(taint["key"], taint["effect"]) for taint in taints] == [(TOLERATION["key"], "NoSchedule")]
    assert cluster.get("node", second.name)["status"]["allocatable"]["nvidia.com/gpu"] == "8"


def test_a_node_that_is_cut_off_runs_on_and_nobody_reaches_it(
    cluster: Cluster, second: SecondNode, namespace: str, pods: dict[str, str]
) -> None:
    asking = f"nc -w 2 {pods[second.name]} 8000 </dev/null 2>/dev/null || echo lost"

    def answers(expected: str) -> None:
        wait_for(expected, lambda: answer(cluster, namespace, FIRST_NODE.name, asking) == expected, 180)

    answers("here")
    second.cut_off()
    answers("lost")
    assert second.components["kubelet"].running
    second.reconnect()
    answers("here")


def test_a_killed_kubelet_leaves_its_pods_running(
    cluster: Cluster, second: SecondNode, namespace: str, pods: dict[str, str]
) -> None:
    second.components["kubelet"].stop()
    asking = f"nc -w 5 {pods[second.name]} 8000 </dev/null || echo lost"
    wait_for("the pod to answer", lambda: answer(cluster, namespace, FIRST_NODE.name, asking) == "here", 180)
    second.components["kubelet"].start()
    second.components["kubelet"].wait_ready()


def test_a_node_that_is_switched_off_leaves_no_process(
    cluster: Cluster, second: SecondNode, pods: dict[str, str]
) -> None:
    processes, folder = second.processes(), f"{cluster.layout.state.name}/{second.name}"
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes]
    assert any(SERVE.encode() in command for command in commands), "the pod's process is one of them"
    assert cgroups.existing(folder)
    second.stop()
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists()] == []
    assert cgroups.existing(folder) == []
    assert SECOND_NODE.name not in cluster.run(["ip", "link", "show", "type", "veth"]).stdout
