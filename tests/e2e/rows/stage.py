"""The namespace and the job of one row, with methods to wait for states of the job and its pods and to change them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo import steps
from finetune_core.names import attempt_name, worker_name
from finetune_operator.objects.labels import TRAINING_CONTAINER
from tests.cluster import Cluster
from tests.cluster.second_node import SecondNode
from tests.e2e.rows import scripts
from tests.e2e.rows.observer import Manifest, Observer, Sighting

JOB = "row"
PATIENCE_SECONDS = 90
"""Seconds of a wait that has no bound by design, such as the wait for pods to start on a busy machine."""


@dataclass(frozen=True)
class Stage:
    """The namespace of one row on the shared cluster, with the row's job."""

    cluster: Cluster
    observer: Observer
    namespace: str
    node: SecondNode | None
    """The second node, or None for rows that lose no node."""

    @classmethod
    def set(
        cls,
        cluster: Cluster,
        observer: Observer,
        node: SecondNode | None,
        labels: Mapping[str, str],
    ) -> Stage:
        """Create a namespace with the `restricted` Pod Security Standard and further ``labels``, and return its
        stage."""
        namespace = f"row-{secrets.token_hex(4)}"
        steps.make_namespace(cluster, namespace)
        if labels:
            cluster.kubectl("label", "namespace", namespace, *(f"{key}={value}" for key, value in labels.items()))
        return cls(cluster, observer, namespace, node)

    @property
    def second_node(self) -> SecondNode:
        """The second node. Only rows that lose a node may ask for it."""
        assert self.node is not None, "only the rows of nodes.py have a second node"
        return self.node

    def apply(self, script: str, spec: Mapping[str, Any]) -> None:
        """Apply a job of two small pods that run ``script``. ``spec`` replaces or extends sections of the job's
        spec."""
        job = steps.manifest_of(Path("examples/quickstart.yaml"), metadata__name=JOB)
        resources = {"nodes": 2, "gpusPerNode": 0, "device": "CPU", "cpu": "20m", "memory": "100Mi"}
        template: dict[str, Any] = {"image": scripts.IMAGE.name, "env": [{"name": "SCRIPT", "value": script}]}
        merged = ("resources", "podTemplate", "runPolicy", "storage")
        changes = {name: value for name, value in spec.items() if name not in merged}
        job["spec"] |= {
            "resources": resources | {"sharedMemory": "8Mi"} | spec.get("resources", {}),
            "podTemplate": template | spec.get("podTemplate", {}),
            # The check before the first attempt is skipped, because the scripted trainer has no model and no data.
            "runPolicy": {"preflight": "Skip"} | spec.get("runPolicy", {}),
            "storage": job["spec"]["storage"] | spec.get("storage", {}),
            **changes,
        }
        steps.apply(self.cluster, job, self.namespace)

    # Reading the state

    def now(self) -> float:
        """Return the current time on the clock that also dates the observed states."""
        return time.monotonic()

    @property
    def uid(self) -> str:
        """The job's `metadata.uid`."""
        first = self.job("the first sight", lambda job: True)
        return str(first.object["metadata"]["uid"])

    def pod_name(self, worker: int, attempt: int = 1) -> str:
        """Return the name of the pod of ``worker`` in ``attempt``."""
        return worker_name(attempt_name(JOB, self.uid, attempt), worker)

    def job(self, what: str, reached: Callable[[Manifest], Any], timeout: float = PATIENCE_SECONDS) -> Sighting:
        """Return the first observed state of the job for which ``reached`` holds. States without a status are
        skipped."""
        return self.observer.first(
            "job", self.namespace, JOB, what, lambda seen: "status" in seen.object and reached(seen.object), timeout
        )

    def pod(
        self,
        worker: int,
        what: str,
        reached: Callable[[Manifest], Any],
        timeout: float = PATIENCE_SECONDS,
        *,
        attempt: int = 1,
    ) -> Sighting:
        """Return the first observed state of a worker's pod for which ``reached`` holds."""
        name = self.pod_name(worker, attempt)
        return self.observer.first(
            "pod", self.namespace, name, what, lambda seen: not seen.deleted and reached(seen.object), timeout
        )

    def pod_gone(self, worker: int, timeout: float = PATIENCE_SECONDS) -> float:
        """Return the time at which a pod of attempt 1 was observed to be removed."""
        name = self.pod_name(worker)
        return self.observer.first("pod", self.namespace, name, "its end", lambda seen: seen.deleted, timeout).at

    def pod_deleted(self, worker: int, *, attempt: int = 1) -> float:
        """Return the time at which a worker's pod was observed to have a deletionTimestamp, or to be removed."""
        name = self.pod_name(worker, attempt)
        return self.observer.first(
            "pod",
            self.namespace,
            name,
            "its deletion",
            lambda seen: seen.deleted or "deletionTimestamp" in seen.object["metadata"],
            PATIENCE_SECONDS,
        ).at

    def both_pods_run(self, attempt: int = 1) -> None:
        """Wait until both training containers run and the status records both pods with their nodes."""
        # The back-off before an attempt doubles each time, so that later attempts need a longer wait.
        patience = PATIENCE_SECONDS * attempt
        for worker in (0, 1):
            self.pod(
                worker, "its container to run", lambda pod: "running" in training_state(pod), patience, attempt=attempt
            )

        def are_recorded(job: Manifest) -> bool:
            current = job["status"]["attempts"].get("current", {})
            placed = [pod for pod in current.get("pods", []) if pod.get("node")]
            return current.get("number") == attempt and len(placed) == 2

        self.job("both pods recorded", are_recorded)

    def ended(self, worker: int, exit_code: int | None = None) -> float:
        """Return the time at which a training container of attempt 1 was observed to have ended, with ``exit_code`` if
        one is given."""

        def reached(pod: Manifest) -> bool:
            end = training_state(pod).get("terminated")
            return end is not None and exit_code in (None, end["exitCode"])

        return self.pod(worker, "the end of the training container", reached).at

    def events(self) -> list[tuple[str, str]]:
        """Return a pair (reason, note) for every event about the job."""
        found = self.cluster.get("events.events.k8s.io", "-n", self.namespace)["items"]
        mine = [event for event in found if event["regarding"]["kind"] == "FineTuneJob"]
        return [(event["reason"], event["note"]) for event in mine]

    # Changing the state

    def delete_pod(self, worker: int, *, force: bool = False, attempt: int = 1) -> None:
        """Delete a worker's pod with kubectl, as a person does."""
        how = ["--force", "--grace-period=0"] if force else []
        name = self.pod_name(worker, attempt)
        self.cluster.kubectl("delete", "pod", name, "-n", self.namespace, "--wait=false", *how)

    def evict_pod(self, worker: int) -> None:
        """Evict a pod of attempt 1 through the eviction API, as a drain does."""
        name = self.pod_name(worker)
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    def change_run_policy(self, **fields: Any) -> float:
        """Patch `spec.runPolicy`, as a person does, and return the time at which the change was observed."""
        patch = json.dumps({"spec": {"runPolicy": fields}})
        changed = ["finetunejob", JOB, "-n", self.namespace, "--type=merge", "--patch", patch, "--output=json"]
        version = json.loads(self.cluster.kubectl("patch", *changed))["metadata"]["generation"]
        return self.job("the change", lambda job: job["metadata"]["generation"] == version).at

    def clear(self) -> None:
        """Delete the namespace with all its objects."""
        self.cluster.kubectl("delete", "namespace", self.namespace, "--wait=false")


def training_state(pod: Manifest) -> Manifest:
    """Return the state of a pod's training container, for example ``{"running": {...}}``, or an empty mapping if there
    is none yet."""
    statuses = pod["status"].get("containerStatuses", [])
    return next((status["state"] for status in statuses if status["name"] == TRAINING_CONTAINER), {})
