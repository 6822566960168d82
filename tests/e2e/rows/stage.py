"""The namespace and the job of one test case. Methods change the job and its pods, or wait until the job or a pod has
reached a state."""

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
from tests.cluster import Cluster, wait_for
from tests.cluster.second_node import SecondNode
from tests.cluster.until_term import HANDLES_TERM
from tests.e2e.rows import scripts
from tests.e2e.rows.observer import Manifest, Observer, Sighting
from tests.operator.builders import is_observed

JOB = "row"
PATIENCE_SECONDS = 90
"""Time limit, in seconds, of waits without a designed time, such as the wait until pods have started on a busy
machine."""


@dataclass(frozen=True)
class Stage:
    """The namespace in which one test case runs on the shared cluster, and the job `JOB` in it."""

    cluster: Cluster
    observer: Observer
    namespace: str
    node: SecondNode | None
    """The second node, or None if the cluster has none."""

    @classmethod
    def set(
        cls,
        cluster: Cluster,
        observer: Observer,
        node: SecondNode | None,
        labels: Mapping[str, str],
    ) -> Stage:
        """Create a namespace with the Pod Security Standard `restricted` and the additional ``labels``, and return its
        `Stage`."""
        namespace = f"row-{secrets.token_hex(4)}"
        steps.make_namespace(cluster, namespace)
        if labels:
            cluster.kubectl("label", "namespace", namespace, *(f"{key}={value}" for key, value in labels.items()))
        return cls(cluster, observer, namespace, node)

    @property
    def second_node(self) -> SecondNode:
        """The second node. Only the test cases in `nodes.py` may ask for it."""
        assert self.node is not None, "only the rows of nodes.py have a second node"
        return self.node

    def apply(self, script: str, spec: Mapping[str, Any]) -> None:
        """Create the job: two small pods that run ``script``. ``spec`` holds changes to the job's spec, by the name of
        the section. In `resources`, `podTemplate`, `runPolicy` and `storage` only the given fields change. Any other
        section is replaced."""
        job = steps.manifest_of(Path("examples/quickstart.yaml"), metadata__name=JOB)
        resources = {"nodes": 2, "gpusPerNode": 0, "device": "CPU", "cpu": "20m", "memory": "100Mi"}
        template: dict[str, Any] = {"image": scripts.IMAGE.name, "env": [{"name": "SCRIPT", "value": script}]}
        merged = ("resources", "podTemplate", "runPolicy", "storage")
        changes = {name: value for name, value in spec.items() if name not in merged}
        job["spec"] |= {
            "resources": resources | {"sharedMemory": "8Mi"} | spec.get("resources", {}),
            "podTemplate": template | spec.get("podTemplate", {}),
            # The preflight check is skipped by default, because the scripted trainer has no model and no data to check.
            "runPolicy": {"preflight": "Skip"} | spec.get("runPolicy", {}),
            "storage": job["spec"]["storage"] | spec.get("storage", {}),
            **changes,
        }
        steps.apply(self.cluster, job, self.namespace)

    # Reading the state

    def now(self) -> float:
        """Return the present time, on the same clock as the times of observed states (`time.monotonic`)."""
        return time.monotonic()

    @property
    def uid(self) -> str:
        """The job's `metadata.uid`. Waits until the job has a status."""
        first = self.job("the first sight", lambda job: True)
        return str(first.object["metadata"]["uid"])

    def pod_name(self, worker: int, attempt: int = 1) -> str:
        """Return the name of the pod of worker number ``worker`` in attempt number ``attempt``."""
        return worker_name(attempt_name(JOB, self.uid, attempt), worker)

    def job(self, what: str, reached: Callable[[Manifest], Any], timeout: float = PATIENCE_SECONDS) -> Sighting:
        """Wait until a state of the job is observed for which ``reached`` holds, and return the first such state.
        States without a status are skipped."""
        return self.observer.first(
            "job", self.namespace, JOB, what, lambda seen: is_observed(seen.object) and reached(seen.object), timeout
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
        """Wait until a state of the worker's pod is observed for which ``reached`` holds, and return the first such
        state. The last state, with which the watch reports the removal of the pod, does not count."""
        name = self.pod_name(worker, attempt)
        return self.observer.first(
            "pod", self.namespace, name, what, lambda seen: not seen.deleted and reached(seen.object), timeout
        )

    def pod_gone(self, worker: int, timeout: float = PATIENCE_SECONDS) -> float:
        """Wait until the worker's pod of attempt 1 is removed from the API server, and return the time at which the
        removal was observed."""
        name = self.pod_name(worker)
        return self.observer.first("pod", self.namespace, name, "its end", lambda seen: seen.deleted, timeout).at

    def pod_deleted(self, worker: int, *, attempt: int = 1) -> float:
        """Wait until the worker's pod has a deletionTimestamp or is removed. Return the time at which this was first
        observed."""
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
        """Wait until both training containers run the script `RUNS` and handle SIGTERM, and the status records
        both pods with their nodes."""
        # Later attempts get a longer wait, because the back-off before an attempt doubles each time.
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

        def handle_term() -> bool:
            names = [self.pod_name(worker, attempt) for worker in (0, 1)]
            return all(HANDLES_TERM in self.cluster.kubectl("logs", name, "-n", self.namespace) for name in names)

        wait_for("both pods to handle SIGTERM", handle_term, patience)

    def ended(self, worker: int, exit_code: int | None = None) -> float:
        """Wait until the training container of the worker's pod in attempt 1 has ended, with ``exit_code`` if that is
        given. Return the time at which the end was observed."""

        def reached(pod: Manifest) -> bool:
            end = training_state(pod).get("terminated")
            return end is not None and exit_code in (None, end["exitCode"])

        return self.pod(worker, "the end of the training container", reached).at

    def events(self) -> list[tuple[str, str]]:
        """Return the reason and note of every event about the job, as pairs."""
        found = self.cluster.get("events.events.k8s.io", "-n", self.namespace)["items"]
        mine = [event for event in found if event["regarding"]["kind"] == "FineTuneJob"]
        return [(event["reason"], event["note"]) for event in mine]

    # Changing the state

    def delete_pod(self, worker: int, *, force: bool = False, attempt: int = 1) -> None:
        """Delete the pod of a worker with kubectl, as a person does."""
        how = ["--force", "--grace-period=0"] if force else []
        name = self.pod_name(worker, attempt)
        self.cluster.kubectl("delete", "pod", name, "-n", self.namespace, "--wait=false", *how)

    def evict_pod(self, worker: int) -> None:
        """Evict the pod of a worker in attempt 1 through the eviction API, as `kubectl drain` does."""
        name = self.pod_name(worker)
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    def change_run_policy(self, **fields: Any) -> float:
        """Change fields of `spec.runPolicy`, as a person does, and return the time at which the change was observed."""
        patch = json.dumps({"spec": {"runPolicy": fields}})
        changed = ["finetunejob", JOB, "-n", self.namespace, "--type=merge", "--patch", patch, "--output=json"]
        version = json.loads(self.cluster.kubectl("patch", *changed))["metadata"]["generation"]
        return self.job("the change", lambda job: job["metadata"]["generation"] == version).at

    def clear(self) -> None:
        """Start the deletion of the namespace with all its objects, without waiting for its end."""
        self.cluster.kubectl("delete", "namespace", self.namespace, "--wait=false")


def training_state(pod: Manifest) -> Manifest:
    """Return the state of the pod's training container, for example ``{"running": {...}}``. If the pod has no such
    state yet, return an empty dictionary."""
    statuses = pod["status"].get("containerStatuses", [])
    return next((status["state"] for status in statuses if status["name"] == TRAINING_CONTAINER), {})
