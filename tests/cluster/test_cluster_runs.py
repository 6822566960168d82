"""What other tests need from a test cluster works: for example pods, DNS, devices, PyTorchJobs and the object store. No
connection leads out of the cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, ClusterError, wait_for
from tests.cluster.api import answers
from tests.cluster.kueue import Kueue, PodSetInfo
from tests.cluster.layout import BRIDGE, BRIDGE_MAC, GPU_PRODUCT, HOST_ADDRESS
from tests.cluster.oci import BUSYBOX_IMAGE
from tests.cluster.waiting import UnreachableError

pytestmark = pytest.mark.cluster


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    wait_for(
        "the namespace's service account",
        lambda: "default" in cluster.kubectl("get", "serviceaccounts", "-n", name),
        20,
    )
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def pod(name: str, script: str, **container: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", script], **container}],
        },
    }


def output_of(cluster: Cluster, namespace: str, manifest: dict[str, Any]) -> str:
    """Run a pod to its end, assert that it succeeded, and return its log."""
    name = manifest["metadata"]["name"]
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))

    def phase() -> str | None:
        status = cluster.get("pod", name, "-n", namespace)["status"]
        return status["phase"] if status["phase"] in {"Succeeded", "Failed"} else None

    def description() -> str:
        return cluster.kubectl("describe", "pod", name, "-n", namespace)

    assert wait_for(f"the pod {name} to end", phase, 60, evidence=description) == "Succeeded", description()
    return cluster.kubectl("logs", name, "-n", namespace)


def pytorchjob(name: str, script: str, workers: int, master: bool = False) -> dict[str, Any]:
    container = {"name": "pytorch", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", script]}
    replica = {"restartPolicy": "Never", "template": {"spec": {"containers": [container]}}}
    replicas = {"Worker": {"replicas": workers, **replica}}
    if master:
        replicas["Master"] = {"replicas": 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"nprocPerNode": "1", "runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas},
    }


def condition(cluster: Cluster, namespace: str, name: str, kind: str) -> bool:
    conditions = cluster.get("pytorchjob", name, "-n", namespace).get("status", {}).get("conditions", [])
    return any(found["type"] == kind and found["status"] == "True" for found in conditions)


def test_pods_resolve_services_and_reach_the_api_server_and_the_object_store(cluster: Cluster, namespace: str) -> None:
    script = (
        "nslookup kubernetes.default.svc.cluster.local >/dev/null && echo resolved;"
        f"wget -q -O - {cluster.minio.in_cluster_endpoint}/minio/health/live && echo stored;"
        "test -s /var/run/secrets/kubernetes.io/serviceaccount/token && echo token"
    )
    assert output_of(cluster, namespace, pod("names", script)).split() == ["resolved", "stored", "token"]


def test_nothing_leaves_the_cluster(cluster: Cluster, namespace: str) -> None:
    with cluster.enter(), pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 443), timeout=5)
    script = "nc -w 3 192.0.2.1 443 </dev/null 2>/dev/null || echo refused"
    assert output_of(cluster, namespace, pod("outside", script)).strip() == "refused"


def test_the_bridge_keeps_its_address_while_pods_come_and_go(cluster: Cluster, namespace: str) -> None:
    # If the bridge changed its MAC address, pods would send to the old address and have no connection for half a
    # minute.
    def address() -> str:
        return str(json.loads(cluster.run(["ip", "-json", "link", "show", BRIDGE]).stdout)[0]["address"])

    seen = {address()}
    for number in range(3):
        output_of(cluster, namespace, pod(f"passer-by-{number}", "cat /sys/class/net/eth0/address"))
        seen.add(address())
    assert seen == {BRIDGE_MAC}


def test_a_thread_that_entered_is_back_outside_afterwards(cluster: Cluster) -> None:
    outside = Path("/proc/thread-self/ns/net").readlink()
    with cluster.enter():
        assert Path("/proc/thread-self/ns/net").readlink() != outside
        assert answers(f"{cluster.minio.endpoint}/minio/health/live")
    assert Path("/proc/thread-self/ns/net").readlink() == outside


def test_each_pod_gets_gpus_of_its_own_on_a_labelled_node(cluster: Cluster, namespace: str) -> None:
    node = cluster.get("node", "node-1")
    assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == GPU_PRODUCT
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    script = "echo $NVIDIA_VISIBLE_DEVICES; sleep 2"
    manifests = [pod(name, script, resources={"limits": {"nvidia.com/gpu": 4}}) for name in ("first", "second")]
    for manifest in manifests:
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))
    devices = [set(output_of(cluster, namespace, manifest).strip().split(",")) for manifest in manifests]
    assert [len(found) for found in devices] == [4, 4]
    assert not devices[0] & devices[1]


def test_a_restricted_namespace_runs_what_is_allowed_and_refuses_what_is_not(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod("root", "id")))
    allowed = pod(
        "nobody",
        "id -u",
        securityContext={
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    )
    assert output_of(cluster, namespace, allowed).strip() == "65532"


def test_a_container_over_its_memory_limit_is_reported_as_killed_for_memory(cluster: Cluster, namespace: str) -> None:
    manifest = pod("hungry", "x=0; while :; do x=$x$x; done", resources={"limits": {"memory": "32Mi"}})
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))

    def reason() -> str | None:
        for status in cluster.get("pod", "hungry", "-n", namespace)["status"].get("containerStatuses", []):
            if "terminated" in status["state"]:
                return str(status["state"]["terminated"]["reason"])
        return None

    assert wait_for("the container to end", reason, 60) == "OOMKilled"


def test_worker_only_pytorchjobs_succeed_when_every_worker_does_and_find_each_other_by_name(
    cluster: Cluster, namespace: str
) -> None:
    script = "until nslookup both-worker-0.$NAMESPACE.svc.cluster.local >/dev/null; do sleep 0.2; done; sleep 1; env"
    job = pytorchjob("both", script.replace("$NAMESPACE", namespace), workers=2)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    wait_for(
        "the job to succeed",
        lambda: condition(cluster, namespace, "both", "Succeeded"),
        60,
        evidence=lambda: cluster.kubectl("describe", "pytorchjobs,pods", "-n", namespace),
    )
    assert "PET_NNODES=2" in cluster.kubectl("logs", "both-worker-1", "-n", namespace)


def test_pytorchjobs_with_a_master_get_its_address(cluster: Cluster, namespace: str) -> None:
    job = pytorchjob("led", "env", workers=1, master=True)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    wait_for("the job to succeed", lambda: condition(cluster, namespace, "led", "Succeeded"), 60)
    assert "MASTER_ADDR=led-master-0" in cluster.kubectl("logs", "led-master-0", "-n", namespace)


def test_the_webhook_refuses_a_job_without_a_container_named_pytorch(cluster: Cluster, namespace: str) -> None:
    job = pytorchjob("nameless", "env", workers=1)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = "other"
    with pytest.raises(ClusterError, match=r"validator\.pytorchjob\.training-operator"):
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))


def test_a_failed_worker_fails_the_job(cluster: Cluster, namespace: str) -> None:
    job = pytorchjob("failing", "exit 7", workers=2)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    wait_for("the job to fail", lambda: condition(cluster, namespace, "failing", "Failed"), 60)


def test_a_program_of_the_cluster_can_be_taken_down_and_brought_back(cluster: Cluster) -> None:
    minio = cluster.components["minio"]
    minio.stop()
    with cluster.enter():
        assert not answers(f"{cluster.minio.endpoint}/minio/health/live")
    minio.start()
    minio.wait_ready()
    cluster.components["api-server"].restart()
    assert "node-1" in cluster.kubectl("get", "nodes")


def test_a_wait_goes_on_while_the_api_server_is_down_or_hangs(cluster: Cluster) -> None:
    server, unanswered = cluster.components["api-server"], []

    def served() -> str:
        try:
            return cluster.kubectl("get", "namespace", "default", "-o", "name", timeout=3)
        except UnreachableError as error:
            unanswered.append(error)
            if len(unanswered) == 1:
                server.start()
                server.wait_ready()
                server.freeze()
            else:
                server.thaw()
            raise

    server.stop()
    assert wait_for("the API server", served, 120).strip() == "namespace/default"
    assert "refused" in str(unanswered[0])
    assert "took longer than 3 s" in str(unanswered[1])
    server.wait_ready()


def test_helm_talks_to_the_cluster(cluster: Cluster) -> None:
    assert "NAME" in cluster.helm("list", "--all-namespaces")
    assert cluster.registry.startswith(HOST_ADDRESS)


class Overtaken(Kueue):
    """A `Kueue` whose first change of a PyTorchJob fails with a conflict: right after the first reading, another writer
    changes the PyTorchJob."""

    overtaken = False

    def get(self, name: str) -> dict[str, Any]:
        found = super().get(name)
        if not self.overtaken:
            self.overtaken = True
            self._cluster.kubectl("annotate", "pytorchjob", name, "-n", self._namespace, "written=meanwhile")
        return found


def test_the_stand_in_for_kueue_repeats_a_change_that_another_writer_made_stale(
    cluster: Cluster, namespace: str
) -> None:
    manifest = pytorchjob("held", "exit 0", workers=1)
    manifest["spec"]["runPolicy"]["suspend"] = True
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))
    kueue = Overtaken(cluster, namespace)
    admitted = kueue.admit("held", PodSetInfo(labels={"podset": "worker"}))
    assert kueue.overtaken
    assert admitted["metadata"]["annotations"]["written"] == "meanwhile"
    assert admitted["spec"]["runPolicy"]["suspend"] is False
    assert admitted["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"]["labels"]["podset"] == "worker"
    evicted = kueue.evict("held")
    assert "metadata" not in evicted["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]


def test_a_command_inside_the_cluster_runs_in_the_callers_folder(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: map}\n")
    create = ("kubectl", "create", "--dry-run=client", "-o", "name", "-f", "map.yaml")
    command = [str(cluster.layout.enter_script), *create]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "configmap/map\n", done.stderr
