"""Fixtures for tests of the operator on the real cluster.

The chart is installed with zero replicas. The operator runs as a program on this machine with the role that the chart
created, so that a missing permission fails a test. Pods of jobs run small stand-ins for the trainer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster import Cluster, wait_for
from tests.cluster.fixtures import started
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.oci import BUSYBOX, BUSYBOX_COMMANDS, Image, write_archive
from tests.operator.builders import REPOSITORY, is_observed, job_manifest
from tests.operator.operator_program import OperatorProgram, operator_program

OPERATOR_NAMESPACE = "operator-tests"
RELEASE = "under-test"
SERVICE_ACCOUNT = "under-test-finetune-operator"
REPORT_PORT, HEALTH_PORT = 18443, 18080

Manifest = dict[str, Any]


@dataclass
class Installed:
    """The chart installed in a cluster, the operator that runs for it, and helpers to apply and await jobs."""

    cluster: Cluster
    operator: OperatorProgram
    ca_certificate: str

    def apply(self, manifest: Manifest, namespace: str) -> str:
        """Apply an object with `kubectl apply`, and return what kubectl printed."""
        return self.cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))

    def job(self, namespace: str, name: str = "quickstart") -> Manifest:
        """Return a FineTuneJob as the API server stores it."""
        found: Manifest = self.cluster.get("finetunejob", name, "-n", namespace)
        return found

    def wait(
        self,
        namespace: str,
        what: str,
        reached: Callable[[Manifest], Any],
        timeout: float = 60,
        name: str = "quickstart",
    ) -> Manifest:
        """Wait until the operator has written the job's status and ``reached`` holds for the job; return the job."""

        def look() -> Manifest | None:
            job = self.job(namespace, name)
            return job if is_observed(job) and reached(job) else None

        return wait_for(what, look, timeout, evidence=lambda: self.evidence(namespace), interval=0.2)

    def evidence(self, namespace: str) -> str:
        """Return text for a failed wait: the jobs, PyTorchJobs and pods of ``namespace``, and the end of the operator's
        log."""
        objects = self.cluster.kubectl("describe", "finetunejobs,pytorchjobs,pods", "-n", namespace)
        return f"{objects}\n{self.operator.evidence()}"


def condition(job: Manifest, kind: str) -> Manifest:
    """Return the condition of type ``kind`` from the status of a job."""
    found: Manifest = next(item for item in job["status"]["conditions"] if item["type"] == kind)
    return found


def settled(job: Manifest) -> bool:
    """Return whether the job has ended: its condition Succeeded is True or False."""
    return bool(condition(job, "Succeeded")["status"] != "Unknown")


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A cluster for these tests alone, because the operator of the end-to-end tests would reconcile the same jobs."""
    yield from started()


@pytest.fixture(scope="package")
def installed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Install the chart with zero replicas, and run the operator as a program with the chart's service account."""
    chart = str(REPOSITORY / "charts/finetune-operator")
    values = ["--set", "replicas=0"]
    cluster.helm("install", RELEASE, chart, "-n", OPERATOR_NAMESPACE, "--create-namespace", *values)
    cluster.learn_new_kinds()
    operator = operator_program(
        cluster,
        tmp_path_factory.mktemp("operator"),
        namespace=OPERATOR_NAMESPACE,
        account=SERVICE_ACCOUNT,
        health_port=HEALTH_PORT,
        settings={"FINETUNE_REPORT_HOST": HOST_ADDRESS, "FINETUNE_REPORT_PORT": str(REPORT_PORT)},
    )
    operator.start()
    operator.wait_ready()
    secret = cluster.get("secret", f"{SERVICE_ACCOUNT}-certificates", "-n", OPERATOR_NAMESPACE)
    yield Installed(cluster, operator, secret["data"]["ca.crt"])
    operator.stop()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for one test, with the Pod Security level `restricted` and the quickstart's storage Secret."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    keys = ["--from-literal=AWS_ACCESS_KEY_ID=a", "--from-literal=AWS_SECRET_ACCESS_KEY=b"]
    cluster.kubectl("create", "secret", "generic", "storage-credentials", "-n", name, *keys)
    wait_for("the service account", lambda: "default" in cluster.kubectl("get", "sa", "-n", name), 20)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="package")
def stand_in(cluster: Cluster) -> Callable[[str], str]:
    """Return a function that loads an image into the node and returns the image's name.

    The function's argument is a shell script, which becomes the image's entry point.
    """
    made: dict[str, str] = {}

    def make(script: str) -> str:
        if script not in made:
            name = f"localhost/stand-in:{uuid.uuid5(uuid.NAMESPACE_OID, script).hex[:12]}"
            links = {f"bin/{command}": "busybox" for command in BUSYBOX_COMMANDS}
            archive = cluster.layout.temporary / "stand-in.tar"
            # The script is the image's entry point, because the operator sets no command in the training container. A
            # preflight pod passes an argument to the entry point.
            command = ["/bin/sh", "-c", script]
            write_archive(Image(name, {"bin/busybox": BUSYBOX}, links, command, is_entry_point=True), archive)
            cluster.run(["ctr", "--namespace=k8s.io", "images", "import", archive])
            archive.unlink()
            made[script] = name
        return made[script]

    return make


def small_job(image: str, **spec: Any) -> Manifest:
    """Return examples/quickstart.yaml as a person would apply it, but with two small nodes and the image ``image``.
    ``spec`` replaces whole sections of the job's spec."""
    resources = {"nodes": 2, "gpusPerNode": 0, "device": "CPU", "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}
    manifest = job_manifest(**({"resources": resources, "podTemplate": {"image": image}} | spec))
    manifest["metadata"] = {"name": "quickstart"}
    return manifest
