"""Measure how long the writes for new jobs take if a bare client makes them instead of the operator. Gate R3 of
docs/performance.md limits the time that the operator needs for these writes. The time of the bare client is about the
shortest possible time.

The bare client reads and watches nothing. It creates each job, and then makes the writes that the operator makes until
the first attempt runs: the first status with attempt 1, the ConfigMap, the PyTorchJob, the status that names the
PyTorchJob, and the event. One write of the operator is left out: the NetworkPolicy of the attempt. The
training-operator and the stub node run as usual. `fleet.py` prints the seconds beside those of R3.
"""

from __future__ import annotations

import asyncio
import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_operator.kube.client import FIELD_MANAGER
from tests.faults.admin import Admin, Manifest
from tests.faults.stub_node import SCRIPT
from tests.faults.world import JOBS, World, running_world
from tests.operator.builders import is_observed

SAMPLE = "the-sample"
APPLY = "application/apply-patch+yaml"
CLIENTS = 16
"""Number of jobs that are written at the same time. It equals the number of the operator's connections to the API
server."""
PATIENCE_SECONDS = 600
_SERVER_FIELDS = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")


@dataclass(frozen=True)
class Sample:
    """Objects that the operator wrote for one sample job, as JSON text. `of` converts one of these texts into the same
    object for another job. ``namespace`` and ``uid`` are those of the sample job."""

    namespace: str
    uid: str
    opened: str
    """The first status that counts attempt 1 as started, before the attempt's PyTorchJob exists."""
    running: str
    """The first status that names the PyTorchJob of attempt 1."""
    config_map: str
    child: str
    event: str

    def of(self, text: str, *, name: str, uid: str, namespace: str) -> Manifest:
        """Parse ``text``, the JSON text of one object of this sample, and return the same object for the job with this
        name, uid and namespace."""
        for mine, other in ((self.uid, uid), (SAMPLE, name), (self.namespace, namespace)):
            text = text.replace(mine, other)
        manifest: Manifest = json.loads(text)
        return manifest


def measure(sample_job: Manifest, jobs: Sequence[Manifest], flags: Mapping[str, Sequence[str]]) -> float:
    """Start a control plane. Return the seconds that a bare client needs to make the operator's writes for ``jobs``.

    ``sample_job`` is one more job, with the name `SAMPLE`. The operator runs it first, so that its objects can be
    copied. ``flags`` holds additional command-line arguments for the programs of the control plane, by the name of the
    program.
    """
    with tempfile.TemporaryDirectory() as folder, running_world(Path(folder), direct=True, flags=flags) as world:
        world.operator.start()
        world.operator.wait_ready(120)
        sample = take_sample(world, sample_job)
        world.operator.stop()
        return write_all(world, sample, jobs)


def take_sample(world: World, job: Manifest) -> Sample:
    """Create ``job``, which has the name `SAMPLE`, while the operator runs, and return the objects that the operator
    writes, without the NetworkPolicy.

    The pods of ``job`` itself run without end, so that its objects can be read before they change. The objects that are
    made from the sample have the script of ``job`` again, so that their pods end as this script demands.
    """
    namespace = world.namespace()
    statuses: list[Manifest] = []

    async def follow() -> None:
        async for event in world.admin.watch(JOBS):
            if event["object"]["metadata"]["namespace"] == namespace and is_observed(event["object"]):
                statuses.append(event["object"]["status"])

    world.loop.spawn(follow())
    words = job["spec"]["podTemplate"]["annotations"][SCRIPT]
    waiting = copy.deepcopy(job)
    waiting["spec"]["podTemplate"]["annotations"][SCRIPT] = "run"
    world.create(namespace, waiting)

    def opens(status: Manifest) -> bool:
        return bool(status["attempts"]["started"] == 1)

    def named(status: Manifest) -> bool:
        return opens(status) and "child" in status

    world.wait("the child to be named", lambda: any(named(status) for status in statuses))
    (child,) = world.children(namespace)
    template = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    template["metadata"]["annotations"][SCRIPT] = words
    uid = child["metadata"]["ownerReferences"][0]["uid"]

    def owned(kind: str) -> Manifest:
        found = world.loop.run(world.admin.list_all(f"/api/v1/namespaces/{namespace}/{kind}"))
        return next(item for item in found if uid in json.dumps(item["metadata"].get("ownerReferences", [])))

    events = world.loop.run(world.admin.list_all(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"))
    return Sample(
        namespace=namespace,
        uid=uid,
        opened=json.dumps(next(status for status in statuses if opens(status))),
        running=json.dumps(next(status for status in statuses if named(status))),
        config_map=json.dumps(_to_create(owned("configmaps"))),
        child=json.dumps(_to_create(child)),
        event=json.dumps(_to_create(next(item for item in events if item["regarding"].get("uid") == uid))),
    )


def _to_create(manifest: Manifest) -> Manifest:
    """Return a copy of the object without its status and the metadata that the API server sets, so that it can be
    created."""
    metadata = {name: value for name, value in manifest["metadata"].items() if name not in _SERVER_FIELDS}
    return {name: value for name, value in manifest.items() if name not in ("status", "metadata")} | {
        "metadata": metadata
    }


def write_all(world: World, sample: Sample, jobs: Sequence[Manifest]) -> float:
    """Create ``jobs``, and make for each job the writes that the beginning of this file lists. Return the
    seconds that all writes together took."""
    namespace = world.namespace()
    began = time.monotonic()
    world.loop.run(_write_all(world.admin, sample, jobs, namespace), PATIENCE_SECONDS)
    return time.monotonic() - began


async def _write_all(admin: Admin, sample: Sample, jobs: Sequence[Manifest], namespace: str) -> None:
    turns = asyncio.Semaphore(CLIENTS)

    async def write(job: Manifest) -> None:
        async with turns:
            await _write(admin, sample, job, namespace)

    await asyncio.gather(*(write(job) for job in jobs))


async def _write(admin: Admin, sample: Sample, job: Manifest, namespace: str) -> None:
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
    metadata = (await admin.call("POST", path, job))["metadata"]
    mine: dict[str, Any] = {"name": metadata["name"], "uid": metadata["uid"], "namespace": namespace}

    async def apply(text: str, version: str) -> str:
        guard = {"name": metadata["name"], "namespace": namespace, "resourceVersion": version}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": guard, "status": sample.of(text, **mine)}
        query = f"fieldManager={FIELD_MANAGER}&force=true"
        answer = await admin.call("PATCH", f"{path}/{metadata['name']}/status?{query}", body, content_type=APPLY)
        return str(answer["metadata"]["resourceVersion"])

    version = await apply(sample.opened, metadata["resourceVersion"])
    await admin.call("POST", f"/api/v1/namespaces/{namespace}/configmaps", sample.of(sample.config_map, **mine))
    children = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"
    await admin.call("POST", children, sample.of(sample.child, **mine))
    await apply(sample.running, version)
    events = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    await admin.call("POST", events, sample.of(sample.event, **mine))
