"""Starts and connects control plane, stub node, fault proxy and operator for the tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.api import GROUP, PLURAL, VERSION
from finetune_operator.objects.labels import ATTEMPT
from tests.cluster import Cluster, wait_for
from tests.cluster.layout import API_URL
from tests.faults.admin import Admin, Manifest, RefusedError, admin_context
from tests.faults.loops import LoopThread
from tests.faults.operators import OperatorProcess, install
from tests.faults.proxy import FaultProxy
from tests.faults.stub_node import StubNode, script
from tests.operator.builders import is_observed, job_manifest

JOBS = f"/apis/{GROUP}/{VERSION}/{PLURAL}"
CHILDREN = "/apis/kubeflow.org/v1/pytorchjobs"
SHORT_NODE_LOSS: Mapping[str, Sequence[str]] = {
    "controller-manager": [
        "--node-monitor-period=1s",
        "--node-monitor-grace-period=20s",
        "--node-startup-grace-period=20s",
        # In the tests many nodes are lost at once. With these options the controller manager soon taints all of them.
        # By default it taints one node in ten seconds, and none if most nodes of a small cluster are lost.
        "--node-eviction-rate=10",
        "--secondary-node-eviction-rate=10",
        "--large-cluster-size-threshold=0",
    ]
}


@dataclass
class World:
    """The running control plane, stub node, proxy and operator, with helpers to create and read jobs and pods."""

    cluster: Cluster
    loop: LoopThread
    admin: Admin
    node: StubNode
    proxy: FaultProxy
    operator: OperatorProcess
    created: dict[str, tuple[str, str]]
    """Maps the uid of every PyTorchJob that was ever created to its namespace and to the number of its attempt. The
    number is a text."""

    # ---- jobs and other objects ----

    def namespace(self) -> str:
        """Create a namespace with a random name and return the name."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def create(self, namespace: str, *jobs: Manifest) -> None:
        """Create ``jobs``, up to 16 at a time."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
        self.loop.run(_create_all(self.admin, path, jobs), 600)

    def call(self, method: str, path: str, body: Manifest | None = None, **options: Any) -> Manifest:
        """Send a request as administrator and return the decoded answer."""
        return self.loop.run(self.admin.call(method, path, body, **options))

    def find(self, path: str) -> Manifest | None:
        """Return the object at ``path``, or None where it does not exist."""
        try:
            return self.call("GET", path)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def jobs(self, namespace: str = "") -> list[Manifest]:
        """Return the jobs of ``namespace``, or all jobs where ``namespace`` is empty."""
        path = JOBS if not namespace else f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
        return self.loop.run(self.admin.list_all(path))

    def job(self, namespace: str, name: str = "job") -> Manifest:
        """Return the job ``name``."""
        return self.call("GET", f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}")

    def children(self, namespace: str) -> list[Manifest]:
        """Return the PyTorchJobs (child objects) of ``namespace``."""
        return self.loop.run(self.admin.list_all(f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"))

    def pods(self, namespace: str) -> list[Manifest]:
        """Return the pods of ``namespace``."""
        return self.loop.run(self.admin.list_all(f"/api/v1/namespaces/{namespace}/pods"))

    def wait(self, what: str, reached: Callable[[], Any], timeout: float = 60, interval: float = 0.2) -> Any:
        """Wait until ``reached`` returns a true value, and return the value. After ``timeout`` seconds raise
        ClusterError with a message that contains ``what``, such as "five attempts", and the end of the operator's
        log."""
        return wait_for(what, reached, timeout, evidence=self.evidence, interval=interval)

    def wait_job(
        self, namespace: str, what: str, reached: Callable[[Manifest], Any], timeout: float = 60, name: str = "job"
    ) -> Manifest:
        """Wait until the operator has written the status of the job ``name`` and ``reached`` holds for the job; return
        the job."""

        def look() -> Manifest | None:
            job = self.job(namespace, name)
            return job if is_observed(job) and reached(job) else None

        found: Manifest = self.wait(what, look, timeout)
        return found

    def keep_operator_alive(self) -> None:
        """Start the operator again if its process has ended, as a Deployment does."""
        if self.operator.pid is None:
            self.operator.stop()
            self.operator.start()

    def evidence(self) -> str:
        """Return a text for a failed wait: the end of the operator's log, the stub node's last errors and the first
        unfinished jobs."""
        open_jobs = [found for found in self.jobs() if not settled(found)]
        lines = [
            f"{found['metadata']['namespace']}/{found['metadata']['name']}: "
            f"{json.dumps(found.get('status', {}).get('attempts'))} "
            f"{[pod['status']['phase'] for pod in self.pods(found['metadata']['namespace'])]}"
            for found in open_jobs[:5]
        ]
        log = self.operator.evidence()
        return "\n".join([log, f"stub node: {self.node.errors[-5:]}", f"{len(open_jobs)} have not ended:", *lines])


async def _create_all(admin: Admin, path: str, jobs: Sequence[Manifest]) -> None:
    turns = asyncio.Semaphore(16)

    async def create(job: Manifest) -> None:
        async with turns:
            await admin.call("POST", path, job)

    await asyncio.gather(*(create(job) for job in jobs))


def job(*words: str, name: str = "job", **spec: Any) -> Manifest:
    """Return the manifest of a job with two nodes. The job's attempts follow the script ``words`` (see stub_node.py).
    ``spec`` replaces whole sections of the job's spec."""
    resources = {"nodes": 2, "gpusPerNode": 0, "device": "CPU", "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}
    template = {"image": "localhost/trainer:1", "annotations": script(*words)}
    manifest = job_manifest(**({"resources": resources, "podTemplate": template} | spec))
    manifest["metadata"] = {"name": name}
    return manifest


def settled(manifest: Manifest) -> bool:
    """Return whether the job has ended, which means that its condition Succeeded is True or False."""
    conditions = manifest.get("status", {}).get("conditions", [])
    return any(item["type"] == "Succeeded" and item["status"] != "Unknown" for item in conditions)


def condition(manifest: Manifest, kind: str) -> Manifest:
    """Return the condition of type ``kind``."""
    found: Manifest = next(item for item in manifest["status"]["conditions"] if item["type"] == kind)
    return found


@contextlib.contextmanager
def running_world(
    folder: Path,
    *,
    delay: float = 0.2,
    direct: bool = False,
    flags: Mapping[str, Sequence[str]] = SHORT_NODE_LOSS,
    settings: Mapping[str, str] | None = None,
) -> Iterator[World]:
    """Start control plane, stub node and proxy for the block. The operator is prepared but not started. ``delay`` is
    that of `StubNode`, and ``settings`` are those of `OperatorProcess`. ``flags`` contains additional command-line
    arguments for the programs of the control plane, by the name of the program.

    With ``direct``, the operator connects to the API server without the proxy.
    """
    with Cluster.start(with_node=False, flags=flags) as cluster:
        install(cluster)
        loop = LoopThread(cluster, "world")
        context = admin_context(cluster)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        pki = cluster.layout.certificates
        server.load_cert_chain(pki / "api-server.crt", pki / "api-server.key")
        client = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        proxy = FaultProxy(server=server, client=client)

        async def bring_up() -> tuple[Admin, StubNode]:
            await proxy.start()
            admin = Admin(context)
            node = StubNode(admin, delay=delay)
            await node.start()
            return admin, node

        created: dict[str, tuple[str, str]] = {}

        async def note_children(admin: Admin) -> None:
            async for event in admin.watch(CHILDREN):
                metadata = event["object"]["metadata"]
                created[metadata["uid"]] = (metadata["namespace"], metadata.get("labels", {}).get(ATTEMPT, ""))

        admin, node = loop.run(bring_up())
        loop.spawn(note_children(admin))
        operator = OperatorProcess(
            cluster, folder, server=API_URL if direct else f"https://127.0.0.1:{proxy.port}", settings=settings
        )
        try:
            yield World(cluster, loop, admin, node, proxy, operator, created)
        finally:
            operator.close()
            loop.run(proxy.stop())
            loop.run(admin.close())
            loop.stop()
