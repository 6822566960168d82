"""The test cases that need a second node. In most of them the pods of a job run on both nodes, and the second node is
drained, loses its network or loses its kubelet. In one case both pods run on the second node and are preempted, and in
one the second node can't allocate its GPUs. The cases run one after another, because there is only one second node.

The designed times come from the defaults of Kubernetes and of the operator. The controller manager marks a node as not
ready 50 to 55 s after the kubelet's last heartbeat, which is 40 to 55 s after the kubelet's death or the cut of the
network. The pods tolerate such a node for 30 s, and are then deleted with a grace period of 90 s. After 60 more seconds
the operator counts a pod on a dead node as gone. The sum is less than 4 minutes.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_operator.objects.labels import JOB_NAME, JOB_UID
from tests.cluster import wait_for
from tests.cluster.layout import FIRST_NODE, GPU_COUNT, GPU_RESOURCE, SECOND_NODE
from tests.cluster.oci import BUSYBOX_IMAGE
from tests.cluster.second_node import TOLERATION
from tests.cluster.until_term import RUNS
from tests.e2e.rows.milestones import BACKOFF, SEEN, STARTING, accounted, cause, next_attempt
from tests.e2e.rows.observer import Manifest
from tests.e2e.rows.scripts import at_first
from tests.e2e.rows.shapes import free
from tests.e2e.rows.sidecar import SIDECAR
from tests.e2e.rows.stage import JOB, Stage

NODE_LOST = 55.0
TOLERATED = 30.0
FOUR_MINUTES = 240.0
RETURN_SECONDS = 120
APART = {
    "weight": 100,
    "podAffinityTerm": {
        "labelSelector": {"matchLabels": {JOB_NAME: JOB}},
        "topologyKey": "kubernetes.io/hostname",
    },
}
ON_BOTH_NODES: dict[str, Any] = {
    "tolerations": [TOLERATION],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [APART]}},
}
"""Fields of `podTemplate` with which the scheduler places one of two pods on each node. If the second node takes no
pods, both pods are placed on the first node."""
ON_SECOND_NODE: dict[str, Any] = {
    "tolerations": [TOLERATION],
    "nodeSelector": {"kubernetes.io/hostname": SECOND_NODE.name},
}


PREFERS_SECOND_NODE: dict[str, Any] = {
    "tolerations": [TOLERATION],
    "affinity": {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 1,
                    "preference": {
                        "matchExpressions": [
                            {"key": "kubernetes.io/hostname", "operator": "In", "values": [SECOND_NODE.name]}
                        ]
                    },
                }
            ]
        }
    },
}


def is_drained(stage: Stage) -> float:
    """Drain the second node, on which one pod runs, with `kubectl drain`, as an administrator does. Return the time at
    which the pod was seen as deleted."""
    worker = worker_on_second_node(stage)
    selector = f"--pod-selector={JOB_UID}={stage.uid}"
    options = ["--force", "--delete-emptydir-data", "--ignore-daemonsets", "--timeout=60s"]
    stage.cluster.kubectl("drain", SECOND_NODE.name, selector, *options, timeout=90)
    return stage.pod_deleted(worker)


def loses_its_kubelet(stage: Stage) -> float:
    """Kill the kubelet of the second node, on which one pod runs. The processes of the pod keep running."""
    worker_on_second_node(stage)
    stage.second_node.components["kubelet"].stop()
    return stage.now()


def is_cut_off(stage: Stage) -> float:
    """Cut the network of the second node, on which one pod runs. The node's kubelet and the processes of the pod keep
    running."""
    worker_on_second_node(stage)
    stage.second_node.cut_off()
    return stage.now()


def is_preempted(stage: Stage) -> float:
    """Create a pod of higher priority that needs all GPUs of the second node. The scheduler then preempts the job's
    pods, which both run on this node. The pod of higher priority runs for 20 s. Return the time at which the pod of
    worker 1 was seen as deleted."""
    stage.both_pods_run()
    stage.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(_preemptor(stage.namespace)))
    return stage.pod_deleted(1)


def _preemptor(namespace: str) -> dict[str, Any]:
    priority = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": namespace},
        "value": 1000,
    }
    container = {
        "name": "main",
        "image": BUSYBOX_IMAGE,
        "command": ["sleep", "20"],
        "resources": {"limits": {GPU_RESOURCE: str(GPU_COUNT)}},
        "securityContext": SIDECAR["securityContext"],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "preemptor", "namespace": namespace},
        "spec": {
            **ON_SECOND_NODE,
            "priorityClassName": namespace,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [priority, pod]}


def cannot_allocate_its_gpus(stage: Stage) -> float:
    """Break the GPUs of the second node, and then resume the suspended job, whose pods prefer that node. Return the
    time at which the job was resumed. The function does not wait for the pods that the kubelet refuses, because they
    exist for less than a second."""
    stage.second_node.refuse_devices()
    return stage.change_run_policy(suspend=False)


def worker_on_second_node(stage: Stage) -> int:
    """Wait until both pods run, and return the number of the worker whose pod is on the second node. Assert that
    exactly one pod is on the second node."""
    stage.both_pods_run()
    nodes = {worker: stage.pod(worker, "a node", lambda pod: "nodeName" in pod["spec"]).object for worker in (0, 1)}
    found = [worker for worker, pod in nodes.items() if pod["spec"]["nodeName"] == SECOND_NODE.name]
    assert len(found) == 1, f"one pod on each node: {found}"
    return found[0]


def drained(stage: Stage, job: Manifest) -> None:
    """After the drain: assert that the pods of attempt 2 ran on the first node, and let the second node take pods
    again."""
    _assert_ran_on_the_first_node(stage)
    stage.cluster.kubectl("uncordon", SECOND_NODE.name)


def preempted(stage: Stage, job: Manifest) -> None:
    """After the preemption: delete the PriorityClass. It belongs to no namespace, so it is not deleted with the job's
    namespace."""
    stage.cluster.kubectl("delete", "priorityclass", stage.namespace)


def refused(stage: Stage, job: Manifest) -> None:
    """After the refusal: repair the GPUs. Assert that the status names the second node for attempt 1, and that the pods
    of attempt 2 ran on the first node, although the job prefers the second node."""
    stage.second_node.allocate_devices()
    assert job["status"]["attempts"]["recent"][0]["node"] == SECOND_NODE.name
    _assert_ran_on_the_first_node(stage)


def lost(stage: Stage, job: Manifest) -> None:
    """After the loss of the node: assert that attempt 2 ended while the pod on the lost node was still Terminating.
    Then bring the node back, and assert that this changes no attempt."""
    _assert_ran_on_the_first_node(stage)
    old = [pod for pod in _pods(stage, attempt=1) if pod["spec"]["nodeName"] == SECOND_NODE.name]
    assert [("deletionTimestamp" in pod["metadata"]) for pod in old] == [True], "the old pod is still Terminating"
    node = stage.second_node
    node.reconnect()
    if not node.components["kubelet"].running:
        node.components["kubelet"].start()
    node.components["kubelet"].wait_ready()
    wait_for("the old pod to go", lambda: not _pods(stage, attempt=1), RETURN_SECONDS)
    after = stage.cluster.get("finetunejob", JOB, "-n", stage.namespace)
    assert after["status"]["attempts"] == job["status"]["attempts"]
    wait_for("the node to take pods again", lambda: _is_untainted(stage), RETURN_SECONDS)


def _is_untainted(stage: Stage) -> bool:
    taints = stage.cluster.get("node", SECOND_NODE.name)["spec"]["taints"]
    return [taint["key"] for taint in taints] == [TOLERATION["key"]]


def _assert_ran_on_the_first_node(stage: Stage) -> None:
    placed = [stage.pod(worker, "a node", lambda pod: "nodeName" in pod["spec"], attempt=2) for worker in (0, 1)]
    assert {seen.object["spec"]["nodeName"] for seen in placed} == {FIRST_NODE.name}


def _pods(stage: Stage, attempt: int) -> list[Manifest]:
    selector = f"{JOB_UID}={stage.uid},finetune.dev/attempt={attempt}"
    found: list[Manifest] = stage.cluster.get("pods", "-n", stage.namespace, "-l", selector)["items"]
    return found


LOSS = (cause(NODE_LOST + TOLERATED + SEEN), accounted(NODE_LOST + TOLERATED + 10 + SEEN), next_attempt(FOUR_MINUTES))
REFUSAL = (
    cause(STARTING + SEEN),
    accounted(STARTING + SEEN),
    next_attempt(STARTING + SEEN + BACKOFF + SEEN),
)

NODES = (
    free(
        "node drained with kubectl drain",
        "EvictionByEvictionAPI",
        at_first(RUNS, worker=None),
        is_drained,
        spec={"podTemplate": ON_BOTH_NODES},
        words=("EvictionByEvictionAPI",),
        check=drained,
    ),
    free(
        "preempted by the scheduler",
        "PreemptionByScheduler",
        at_first(RUNS, worker=None),
        is_preempted,
        spec={"podTemplate": ON_SECOND_NODE, "resources": {"gpusPerNode": GPU_COUNT // 2, "device": "GPU"}},
        words=("PreemptionByScheduler",),
        check=preempted,
    ),
    *(
        free(
            name,
            "DeletionByTaintManager",
            at_first(RUNS, worker=None),
            fault,
            spec={"podTemplate": ON_BOTH_NODES},
            words=("DeletionByTaintManager",),
            milestones=LOSS,
            check=lost,
        )
        for name, fault in (("the node's kubelet dies", loses_its_kubelet), ("the node is cut off", is_cut_off))
    ),
    free(
        "the node's GPUs can't be allocated",
        "NodeRefused",
        at_first(RUNS, worker=None),
        cannot_allocate_its_gpus,
        spec={
            "podTemplate": PREFERS_SECOND_NODE,
            "resources": {"gpusPerNode": 1, "device": "GPU"},
            "runPolicy": {"suspend": True},
        },
        words=("UnexpectedAdmissionError", SECOND_NODE.name),
        milestones=REFUSAL,
        check=refused,
    ),
)
