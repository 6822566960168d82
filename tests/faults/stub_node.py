"""A stub node without containers: it updates the pods of PyTorchJobs as a kubelet does, so that jobs end in seconds.

The stub node also simulates drains, deletions and lost nodes. The annotation `stub-node/script` of a pod contains one
word for each attempt, for example ``"exit-75 drained done"``. The word determines how the attempt ends. Attempts after
the last word use the last word again. Training pods without the annotation keep running. The pod of a preflight check
always succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp

from finetune_core.api import GROUP, PLURAL, VERSION
from finetune_core.contract import EXIT_CODES, ArtifactRecord, Outcome, Result
from finetune_core.contract.preflight_result import PreflightResult
from finetune_operator.objects.labels import ATTEMPT, JOB_NAME, PREFLIGHT, REPLICA_INDEX, TRAINING_CONTAINER
from tests.faults.admin import MERGE_PATCH, Admin, Manifest, RefusedError

SCRIPT = "stub-node/script"
NODE = "stub-1"
HEARTBEAT_SECONDS = 2.0
TRIES, RETRY_SECONDS = 20, 0.2
TERMINATION_SECONDS = 0.5
"""Seconds from the deletion of a running pod to the end of its trainer. A real trainer would need this time to save a
checkpoint."""
PASSES = "passes"
DISRUPTIONS = ("drained", "deleted", "vanished", "lost")
STRATEGIC = "application/strategic-merge-patch+json"
GANG = "training.kubeflow.org/job-name"
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


def script(*words: str) -> dict[str, str]:
    """Return the annotation with the script ``words``, for `podTemplate.annotations`."""
    return {SCRIPT: " ".join(words)}


def message(outcome: Outcome) -> str:
    """Return the termination message that a trainer with this ``outcome`` leaves."""
    artifact = ArtifactRecord(uri="s3://bucket/artifacts/000001", step=100, bytes=12, manifest_sha256="ab")
    done = outcome in (Outcome.COMPLETED, Outcome.EARLY_STOPPED)
    result = Result(outcome=outcome, message="", step=100, artifact=artifact if done else None)
    return result.to_termination_message()


class StubNode:
    """Watches the pods of PyTorchJobs and preflight checks, and updates their status.

    All methods run in one event loop.
    """

    def __init__(self, admin: Admin, *, delay: float = 0.2) -> None:
        """Prepare the node. ``delay`` is the number of seconds from the moment at which all pods of an attempt run
        until the node carries out the script's word for the attempt. A word in `DISRUPTIONS` waits longer if the job's
        status does not list the pods yet."""
        self._admin = admin
        self._delay = delay
        self._pods: dict[str, Manifest] = {}
        self._gangs: dict[str, dict[str, Manifest]] = {}
        self._busy: set[str] = set()
        self._acted: set[str] = set()
        self._alive = {NODE}
        self._lost: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.errors: list[str] = []
        """Errors of requests that failed in every try, and of background tasks that failed."""

    async def start(self) -> None:
        """Create the Node object and start the watch and the heartbeat."""
        await self._join(NODE)
        self._spawn(self._heartbeat())
        self._spawn(self._watch())

    # ---- the node itself ----

    async def _join(self, node: str) -> None:
        """Create a ready Node with its Lease. If the Node exists already, it is kept."""
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "",
            "lastHeartbeatTime": _now(),
        }
        ready["lastTransitionTime"] = _now()
        await self._create("/api/v1/nodes", {"metadata": {"name": node}, "status": {"conditions": [ready]}})
        spec = {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": _micro_now()}
        await self._create(_LEASES, {"metadata": {"name": node}, "spec": spec})
        self._alive.add(node)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.gather(*(self._try(partial(self._renew, node)) for node in self._alive - self._lost))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _renew(self, node: str) -> None:
        renewed = {"spec": {"renewTime": _micro_now()}}
        await self._admin.call("PATCH", f"{_LEASES}/{node}", renewed, content_type=MERGE_PATCH)

    # ---- pods ----

    async def _watch(self) -> None:
        async for event in self._admin.watch("/api/v1/pods"):
            pod = event["object"]
            uid, labels = pod["metadata"]["uid"], pod["metadata"].get("labels", {})
            if GANG not in labels and PREFLIGHT not in labels:
                continue
            gang = self._gangs.setdefault(_gang_of(pod), {})
            if event["type"] == "DELETED":
                self._pods.pop(uid, None)
                gang.pop(uid, None)
                continue
            self._pods[uid] = gang[uid] = pod
            self._look(pod)

    def _look(self, pod: Manifest) -> None:
        """Start the next step of ``pod`` unless another step of the pod is running or the pod's node is lost."""
        uid = pod["metadata"]["uid"]
        if uid in self._busy or pod["spec"].get("nodeName") in self._lost:
            return
        step = self._next_step(pod)
        if step is not None:
            self._busy.add(uid)
            self._spawn(self._do(pod, step))

    def _next_step(self, pod: Manifest) -> Callable[[Manifest], Awaitable[None]] | None:
        if "deletionTimestamp" in pod["metadata"]:
            return self._terminate
        if not pod["spec"].get("nodeName"):
            return None if word_of(pod) == "pending" else self._bind
        if pod["status"]["phase"] == "Pending":
            return self._run
        gang = _gang_of(pod)
        if pod["status"]["phase"] == "Running" and gang not in self._acted and self._is_complete(pod):
            self._acted.add(gang)
            # `_befall` carries out the script's word for this attempt. It runs as a task of its own and not as a step
            # of the pod, because it may wait until the pod is gone (see `_suspend`). The deletion of a pod is handled
            # in a step, which can't begin while another step of the pod runs.
            self._spawn(self._try(partial(self._befall, pod)))
        return None

    async def _do(self, seen: Manifest, step: Callable[[Manifest], Awaitable[None]]) -> None:
        uid = seen["metadata"]["uid"]
        try:
            await self._try(partial(step, seen))
        finally:
            self._busy.discard(uid)
        # `_look` ignores events of a busy pod, so the newest state of the pod is handled now.
        latest = self._pods.get(uid)
        if latest is not None and latest is not seen:
            self._look(latest)

    async def _bind(self, pod: Manifest) -> None:
        node = NODE
        if word_of(pod) == "lost" and _index(pod) == 1:
            node = f"lost-{pod['metadata']['labels'][GANG]}"
            await self._join(node)
        name = pod["metadata"]["name"]
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": node}}
        await self._admin.call("POST", f"{_path(pod)}/binding", binding)

    async def _run(self, pod: Manifest) -> None:
        state = {"running": {"startedAt": _now()}}
        ready = [{"type": kind, "status": "True"} for kind in ("Initialized", "ContainersReady", "Ready")]
        await self._report(pod, {"phase": "Running", "startTime": _now(), "conditions": ready}, state)

    async def _terminate(self, pod: Manifest) -> None:
        """Carry out the deletion of ``pod``: a running trainer ends with exit code 143, then the pod is removed."""
        if pod["status"]["phase"] == "Running":
            await asyncio.sleep(TERMINATION_SECONDS)
            await self.end(pod, EXIT_CODES[Outcome.STOPPED], message(Outcome.STOPPED))
        uid = pod["metadata"]["uid"]
        await self._admin.call("DELETE", _path(pod), {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})

    async def end(self, pod: Manifest, code: int, text: str = "", reason: str = "") -> None:
        """Report the training container of ``pod`` as terminated with exit code ``code`` and message ``text``."""
        why = reason or ("Completed" if code == 0 else "Error")
        end = {"exitCode": code, "reason": why, "message": text, "startedAt": _now(), "finishedAt": _now()}
        await self._report(pod, {"phase": "Succeeded" if code == 0 else "Failed"}, {"terminated": end})

    async def _report(self, pod: Manifest, status: Manifest, state: Manifest) -> None:
        image = pod["spec"]["containers"][0]["image"]
        container = {
            "name": TRAINING_CONTAINER,
            "state": state,
            "ready": "running" in state,
            "restartCount": 0,
            "image": image,
            "imageID": re.sub(r"(:[^/:@]+)?(@.+)?$", "", image) + "@sha256:" + 64 * "0",
            "containerID": f"stub://{pod['metadata']['uid']}",
        }
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {**status, "containerStatuses": [container]}}
        await self._admin.call("PATCH", f"{_path(pod)}/status", body, content_type=STRATEGIC)

    # ---- the script, once all pods of an attempt (a gang) run ----

    def _gang(self, pod: Manifest) -> list[Manifest]:
        return sorted(self._gangs.get(_gang_of(pod), {}).values(), key=_index)

    def _is_complete(self, pod: Manifest) -> bool:
        sizes = [item["value"] for item in pod["spec"]["containers"][0].get("env", []) if item["name"] == "PET_NNODES"]
        size = int(sizes[0]) if sizes else 1
        running = [other for other in self._gang(pod) if other["status"]["phase"] == "Running"]
        return len(running) == size

    async def _befall(self, pod: Manifest) -> None:
        await asyncio.sleep(self._delay)
        pods, word = self._gang(pod), word_of(pod)
        if word in DISRUPTIONS:
            await self._until_recorded(pods)
        last = pods[-1]
        if word == PASSES:
            await self.end(pod, 0, PreflightResult(findings=[]).to_termination_message())
        elif word == "done":
            for each in pods:
                await self.end(each, 0, message(Outcome.COMPLETED))
        elif word.startswith("exit-"):
            code = int(word.removeprefix("exit-"))
            outcome = next((known for known, number in EXIT_CODES.items() if number == code), None)
            await self.end(last, code, message(outcome) if outcome else "")
        elif word == "oom":
            await self.end(last, 137, reason="OOMKilled")
        elif word == "evicted":
            status = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
            end = {"exitCode": 137, "reason": "Error", "startedAt": _now(), "finishedAt": _now()}
            await self._report(last, status, {"terminated": end})
        elif word == "drained":
            await self._drain(last)
        elif word == "deleted":
            await self._admin.call("DELETE", _path(last))
        elif word == "vanished":
            await self._admin.call("DELETE", _path(last), {"gracePeriodSeconds": 0})
        elif word == "lost":
            self._lost.add(last["spec"]["nodeName"])
        elif word == "suspended":
            await self._suspend(pod)
        elif word == "cancelled":
            await self._patch_job(pod, {"cancel": True})
        elif word not in ("", "run"):
            raise ValueError(f"no such word: {word}")

    async def _until_recorded(self, pods: list[Manifest]) -> None:
        """Wait until the status of the job lists ``pods``, before one of the pods is disturbed.

        Without this wait, an operator that is down for the whole life of a pod could not know that the pod existed,
        because training-operator replaces a lost pod within a second.
        """
        path = f"{_job_path(pods[0])}/status"
        wanted = {pod["metadata"]["uid"] for pod in pods}
        while True:
            attempts = (await self._admin.call("GET", path)).get("status", {}).get("attempts", {})
            if wanted <= {record["uid"] for record in attempts.get("current", {}).get("pods", [])}:
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _drain(self, pod: Manifest) -> None:
        """Evict ``pod`` and repeat the eviction until the pod is being deleted, as `kubectl drain` does.

        An overloaded API server may accept an eviction without carrying it out.
        """
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
        for _ in range(TRIES):
            await self._admin.call("POST", f"{_path(pod)}/eviction", eviction)
            await asyncio.sleep(RETRY_SECONDS)
            latest = self._pods.get(pod["metadata"]["uid"])
            if latest is None or "deletionTimestamp" in latest["metadata"]:
                return
        raise TimeoutError(f"{pod['metadata']['name']} was evicted {TRIES} times and is still there")

    async def _suspend(self, pod: Manifest) -> None:
        """Suspend the job, and resume the job once its pods are gone."""
        await self._patch_job(pod, {"suspend": True})
        while self._gang(pod):
            await asyncio.sleep(0.1)
        await self._patch_job(pod, {"suspend": False})

    async def _patch_job(self, pod: Manifest, policy: Manifest) -> None:
        await self._admin.call("PATCH", _job_path(pod), {"spec": {"runPolicy": policy}}, content_type=MERGE_PATCH)

    # ---- tasks and retries ----

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(repr(error))

    async def _create(self, path: str, manifest: Manifest) -> None:
        with contextlib.suppress(RefusedError):
            await self._admin.call("POST", path, manifest)

    async def _try(self, attempt: Callable[[], Awaitable[object]]) -> None:
        """Run ``attempt`` until it succeeds, at most 20 times.

        The status 404 or 422 ends the tries and is not recorded as an error, because it means that the object no longer
        exists.
        """
        last: Exception | None = None
        for _ in range(TRIES):
            try:
                await attempt()
            except RefusedError as error:
                if error.status in (404, 422):
                    return
                last = error
            except (aiohttp.ClientError, TimeoutError) as error:
                last = error
            else:
                return
            await asyncio.sleep(RETRY_SECONDS)
        # If even the last try got the status 409, a newer pod has this name. This is not an error.
        if not (isinstance(last, RefusedError) and last.status == 409):
            self.errors.append(repr(last))


def word_of(pod: Manifest) -> str:
    """Return the word of the script for the pod's attempt, or an empty text if the pod has no script. For a preflight
    pod, return `PASSES`."""
    if PREFLIGHT in pod["metadata"]["labels"]:
        return PASSES
    words = pod["metadata"].get("annotations", {}).get(SCRIPT, "").split()
    attempt = int(pod["metadata"]["labels"].get(ATTEMPT, "1"))
    return words[min(attempt, len(words)) - 1] if words else ""


def _ns(pod: Manifest) -> str:
    return str(pod["metadata"]["namespace"])


def _gang_of(pod: Manifest) -> str:
    metadata = pod["metadata"]
    return f"{metadata['namespace']}/{metadata['labels'].get(GANG, metadata['name'])}"


def _index(pod: Manifest) -> int:
    return int(pod["metadata"]["labels"].get(REPLICA_INDEX, "0"))


def _job_path(pod: Manifest) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{_ns(pod)}/{PLURAL}/{pod['metadata']['labels'][JOB_NAME]}"


def _path(pod: Manifest) -> str:
    return f"/api/v1/namespaces/{_ns(pod)}/pods/{pod['metadata']['name']}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
