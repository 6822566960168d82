"""An in-memory model of the API server and of training-operator, which tests use in place of `KubeClient`.

The model is complete enough for the whole life of one job, and lets the operator crash after any chosen write. Tests
with the real servers are in test_on_cluster.py.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

from finetune_core.api.conditions import ConditionType
from finetune_operator.kube.api_errors import ApiError
from finetune_operator.objects.labels import PREFLIGHT, TRAINING_CONTAINER
from finetune_operator.queue.key import Key

Manifest = dict[str, Any]
Json = TypeVar("Json")
_OWN = set(ConditionType)


def copied(value: Json) -> Json:
    """Return a copy of the JSON value ``value``, such as an object that the model server stores or returns.
    `copy.deepcopy` is not used, because it would take most of the time of the tests with large statuses."""
    return cast(Json, _copied(value))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


class CrashedError(Exception):
    """Raised right after a write, as if the operator had been killed there."""


class ModelServer:
    """Holds one FineTuneJob with its objects, and answers the requests that `KubeClient` would send."""

    def __init__(
        self,
        job: Manifest,
        now: datetime,
        *,
        crash_after: int | None = None,
        refuses: str = "",
        pods_run: bool = True,
        saving: float = 0,
    ) -> None:
        """Store ``job`` at the time ``now``.

        The operator crashes after write number ``crash_after``, counted from 1. If ``refuses`` is not empty, the
        creation of a PyTorchJob fails with ``refuses`` as the message. With ``pods_run``, new pods run at once. A
        deleted pod saves its checkpoint for ``saving`` seconds before it is gone.
        """
        self.saving = saving
        self.refuses = refuses
        self.pods_run = pods_run
        self.job = job
        self.others: dict[str, Manifest] = {}
        """Further FineTuneJobs of the namespace by name, which nobody reconciles."""
        self.now = now
        self.children: dict[str, Manifest] = {}
        self.config_maps: dict[str, Manifest] = {}
        self.network_policies: dict[str, Manifest] = {}
        self.pods: list[Manifest] = []
        self.checks: list[Manifest] = []
        """Preflight pods that exist."""
        self.tried: list[str] = []
        """Names of all preflight pods that were ever created."""
        self.refuses_pods = ""
        self.events: list[Manifest] = []
        self.writes: list[str] = []
        self.created: list[str] = []
        self._crash_after = crash_after
        self._version = 1
        self._generation = 0
        self._applied_conditions = {item["type"] for item in job.get("status", {}).get("conditions", [])} & _OWN

    # ---- requests of the operator ----

    async def get_job(self, key: Key) -> Manifest | None:
        return copied(self.others.get(key.name, self.job if key.name == self.job["metadata"]["name"] else None))

    async def apply_status(self, _key: Key, resource_version: str, status: Manifest) -> str:
        if resource_version != self.job["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "the object has been modified")
        if status == self.job.get("status"):
            return resource_version  # the API server stores nothing, and the resourceVersion stays the same
        self._version += 1
        self.job["metadata"]["resourceVersion"] = str(self._version)
        # Server-side apply keeps the conditions of other field managers, and removes those that the operator no longer
        # applies.
        old = self.job.get("status", {}).get("conditions", [])
        applied = {item["type"] for item in status["conditions"]}
        known = applied | self._applied_conditions
        others = [item for item in old if isinstance(item, dict) and str(item.get("type", "Ready")) not in known]
        self._applied_conditions = applied
        self.job["status"] = status | {"conditions": [*status["conditions"], *others]}
        self._wrote("status")
        return str(self._version)

    async def get_child(self, _namespace: str, name: str) -> Manifest | None:
        return copied(self.children.get(name))

    async def create_child(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if self.refuses:
            raise ApiError(403, "Forbidden", self.refuses)
        if name in self.children:
            raise ApiError(409, "AlreadyExists", name)
        self.children[name] = copied(manifest)
        self.children[name]["metadata"]["uid"] = f"uid-{len(self.created)}"
        self.created.append(name)
        self._make_pods(self.children[name])
        self._wrote(f"create {name}")
        return copied(self.children[name])

    async def delete_child(self, _namespace: str, name: str, uid: str) -> None:
        if name in self.children and self.children[name]["metadata"]["uid"] == uid:
            del self.children[name]
            self.end_pods_of(name)
            self._wrote(f"delete {name}")

    async def get_config_map(self, _namespace: str, name: str) -> Manifest | None:
        return self.config_maps.get(name)

    async def create_config_map(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if name in self.config_maps:
            raise ApiError(409, "AlreadyExists", name)
        self.config_maps[name] = copied(manifest)
        self.config_maps[name]["metadata"]["uid"] = f"uid-{len(self.writes)}"
        self._wrote(f"create configmap {name}")
        return manifest

    async def delete_config_map(self, _namespace: str, name: str, uid: str) -> None:
        if name in self.config_maps and self.config_maps[name]["metadata"]["uid"] == uid:
            del self.config_maps[name]
            self._wrote(f"delete configmap {name}")

    async def get_network_policy(self, _namespace: str, name: str) -> Manifest | None:
        return self.network_policies.get(name)

    async def create_network_policy(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if name in self.network_policies:
            raise ApiError(409, "AlreadyExists", name)
        self.network_policies[name] = copied(manifest)
        self.network_policies[name]["metadata"]["uid"] = f"uid-of-policy-{name}"
        self._wrote(f"create networkpolicy {name}")
        return manifest

    async def delete_network_policy(self, _namespace: str, name: str, uid: str) -> None:
        if name in self.network_policies and self.network_policies[name]["metadata"]["uid"] == uid:
            del self.network_policies[name]
            self._wrote(f"delete networkpolicy {name}")

    async def create_pod(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if self.refuses_pods:
            raise ApiError(403, "Forbidden", self.refuses_pods)
        if any(check["metadata"]["name"] == name for check in self.checks):
            raise ApiError(409, "AlreadyExists", name)
        check = copied(manifest)
        check["metadata"] |= {"uid": f"uid-{name}", "creationTimestamp": self.now.isoformat()}
        container = {"name": TRAINING_CONTAINER, "state": {"running": {"startedAt": self.now.isoformat()}}}
        check["status"] = {"phase": "Running", "containerStatuses": [container]}
        self.checks.append(check)
        self.tried.append(name)
        self._wrote(f"create pod {name}")
        return copied(check)

    async def delete_pod(self, _namespace: str, name: str, uid: str) -> bool:
        gone = [check for check in self.checks if (check["metadata"]["name"], check["metadata"]["uid"]) == (name, uid)]
        if gone:
            self.checks.remove(gone[0])
            self._wrote(f"delete pod {name}")
        orphans = [pod for pod in self.pods if (pod["metadata"]["name"], pod["metadata"]["uid"]) == (name, uid)]
        for pod in orphans:
            self._end_pod(pod)
            self._wrote(f"delete pod {name}")
        self.pods = [pod for pod in self.pods if self.saving or "gone" not in pod]
        return bool(gone or orphans)

    async def list_pods(self, _namespace: str, selector: str) -> list[Manifest]:
        return copied(self.checks if PREFLIGHT in selector else [*self.pods, *self.checks])

    async def annotate_pod(self, _namespace: str, name: str, uid: str, annotations: dict[str, str]) -> None:
        for pod in self.pods:
            if (pod["metadata"]["name"], pod["metadata"]["uid"]) == (name, uid):
                pod["metadata"].setdefault("annotations", {}).update(annotations)

    async def list_warnings(self, _namespace: str, _uid: str) -> list[Manifest]:
        return []

    async def create_event(self, _namespace: str, manifest: Manifest) -> bool:
        known = [event["metadata"]["name"] for event in self.events]
        if manifest["metadata"]["name"] in known:
            return False
        self.events.append(manifest)
        return True

    # ---- what people, nodes, Kueue and training-operator do ----

    def pass_time(self, seconds: float) -> None:
        """Move the clock ``seconds`` on, and remove the pods that finished saving their checkpoint before the new
        time."""
        self.now += timedelta(seconds=seconds)
        self.pods = [pod for pod in self.pods if pod.get("gone", self.now) >= self.now]

    def end_pods_of(self, child: str) -> None:
        """Delete the pods of the PyTorchJob ``child``. Each pod exists until it has saved its checkpoint."""
        if not self.saving:
            self.pods = [pod for pod in self.pods if pod["child"] != child]
        for pod in self.pods:
            if pod["child"] == child and "gone" not in pod:
                self._end_pod(pod)

    def _end_pod(self, pod: Manifest) -> None:
        pod["gone"] = self.now + timedelta(seconds=self.saving)
        pod["metadata"]["deletionTimestamp"] = (self.now + timedelta(seconds=90)).isoformat()
        pod["metadata"]["deletionGracePeriodSeconds"] = 90

    def orphan_pods(self) -> bool:
        """Delete the PyTorchJob but not its pods, as `kubectl delete --cascade=orphan` does; return True.

        The PyTorchJob must exist. The pods lose their owner reference, which the garbage collector removes.
        """
        for pod in self.pods:
            pod["child"] = None
            del pod["metadata"]["ownerReferences"]
        return bool(self.children.popitem())

    def end_pods(self, exit_code: int, message: str = "") -> bool:
        """End the training container of every running pod; return whether any pod was running."""
        running = [pod for pod in self.pods if "running" in pod["status"]["containerStatuses"][0]["state"]]
        for pod in running:
            started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
            times = {"startedAt": started, "finishedAt": self.now.isoformat()}
            end = {"exitCode": exit_code, "message": message} | times
            pod["status"]["containerStatuses"][0]["state"] = {"terminated": end}
            pod["status"]["phase"] = "Succeeded" if exit_code == 0 else "Failed"
        return bool(running)

    def end_check(self, exit_code: int, message: str = "") -> bool:
        """End the running preflight pod; return whether one was running."""
        for check in self.checks:
            (container,) = check["status"]["containerStatuses"]
            if "running" in container["state"] and "deletionTimestamp" not in check["metadata"]:
                end = {"exitCode": exit_code, "message": message, "finishedAt": self.now.isoformat()}
                container["state"] = {"terminated": end}
                check["status"]["phase"] = "Succeeded" if exit_code == 0 else "Failed"
                return True
        return False

    def ask_deletion(self, index: int) -> bool:
        """Ask for the deletion of the pod with ``index``; return whether the pod exists."""
        for pod in self.pods:
            if pod["metadata"]["labels"]["training.kubeflow.org/replica-index"] == str(index):
                pod["metadata"]["deletionTimestamp"] = (self.now + timedelta(seconds=90)).isoformat()
                pod["metadata"]["deletionGracePeriodSeconds"] = 90
                return True
        return False

    def set_policy(self, **changes: Any) -> bool:
        """Change fields of `runPolicy` as a person does; return True."""
        self._version += 1
        self.job["spec"]["runPolicy"] = self.job["spec"].get("runPolicy", {}) | changes
        self.job["metadata"]["generation"] += 1
        self.job["metadata"]["resourceVersion"] = str(self._version)
        return True

    def hold_child(self) -> bool:
        """Suspend the PyTorchJob as Kueue does, and delete its pods; return True."""
        (child,) = self.children.values()
        child["spec"].setdefault("runPolicy", {})["suspend"] = True
        self._set_child_condition(child, "Suspended", "True")
        self.end_pods_of(child["metadata"]["name"])
        return True

    def release_child(self) -> bool:
        """Resume the PyTorchJob as Kueue does, and create new pods if the old pods are gone; return True."""
        (child,) = self.children.values()
        child["spec"]["runPolicy"]["suspend"] = False
        self._set_child_condition(child, "Suspended", "False")
        if any(pod["child"] == child["metadata"]["name"] for pod in self.pods):
            # Old pods still exist. training-operator counts a running pod with a deletionTimestamp and restartPolicy
            # Never as failed, so the PyTorchJob fails.
            failed = {"type": "Failed", "status": "True", "lastTransitionTime": self.now.isoformat()}
            child["status"]["conditions"].append(failed)
        else:
            self._make_pods(child)
        return True

    def _set_child_condition(self, child: Manifest, kind: str, status: str) -> None:
        condition = {"type": kind, "status": status, "lastTransitionTime": self.now.isoformat()}
        child["status"] = {"conditions": [condition]}

    def _make_pods(self, child: Manifest) -> None:
        self._generation += 1
        worker = child["spec"]["pytorchReplicaSpecs"]["Worker"]
        image = worker["template"]["spec"]["containers"][0]["image"].partition(":")[0]
        for index in range(worker["replicas"]):
            labels = worker["template"]["metadata"]["labels"] | {"training.kubeflow.org/replica-index": str(index)}
            name = f"{child['metadata']['name']}-worker-{index}"
            now = self.now.isoformat()
            scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now}
            state = (
                {"running": {"startedAt": now}}
                if self.pods_run
                else {"waiting": {"reason": "ErrImagePull", "message": "no image"}}
            )
            container = {"name": TRAINING_CONTAINER, "state": state, "imageID": f"{image}@sha256:0123"}
            self.pods.append(
                {
                    "child": child["metadata"]["name"],
                    "metadata": {
                        "name": name,
                        "ownerReferences": [
                            {
                                "apiVersion": child["apiVersion"],
                                "kind": child["kind"],
                                "name": child["metadata"]["name"],
                                "uid": child["metadata"]["uid"],
                                "controller": True,
                            }
                        ],
                        "uid": f"{name}-{child['metadata']['uid']}-{self._generation}",
                        "labels": labels,
                        "creationTimestamp": self.now.isoformat(),
                    },
                    "spec": {"nodeName": "node-1"},
                    "status": {"phase": "Running", "containerStatuses": [container], "conditions": [scheduled]},
                }
            )

    def _wrote(self, what: str) -> None:
        self.writes.append(what)
        if len(self.writes) == self._crash_after:
            raise CrashedError(what)


Script = list[Callable[[ModelServer], bool]]
"""The events in the life of a job, in their order.

Each function makes its event happen and returns True, or returns False while the event can not happen yet.
"""
