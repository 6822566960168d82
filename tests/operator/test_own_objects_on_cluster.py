"""The operator's own objects on the real cluster: Lease, certificate Secret and EndpointSlice.

The chart is installed as Argo CD with its default settings would install it, that is, without objects of some kinds.
The tests then delete the operator's objects, and the operator must create each of them again.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.argo_cd import is_excluded
from tests.cluster import Cluster, ClusterError, wait_for
from tests.cluster.layout import BRIDGE
from tests.operator.builders import REPOSITORY
from tests.operator.conftest import Installed, condition, small_job
from tests.operator.operator_program import OperatorProgram, operator_program
from tests.operator.test_two_replicas import owner_of_the_slice

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ADDRESS = "10.251.0.11"
NAMESPACE, ACCOUNT = "from-git", "finetune-operator"
REPORT_PORT, HEALTH_PORT = 18643, 18680


@dataclass
class OwnObjects:
    """A release that Argo CD could have installed, whose operator runs as a program."""

    cluster: Cluster
    program: OperatorProgram

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object of the release's namespace, or None if kubectl fails, mostly because the object does not
        exist."""
        try:
            found: dict[str, Any] = self.cluster.get(kind, name, "-n", NAMESPACE)
        except ClusterError:
            return None
        return found

    def comes_back(self, kind: str, name: str) -> dict[str, Any]:
        """Delete an object, wait until an object of the same name exists again, and return the new object."""
        old = self.cluster.get(kind, name, "-n", NAMESPACE)
        self.cluster.kubectl("delete", kind, name, "-n", NAMESPACE)

        def new() -> dict[str, Any] | None:
            found = self.find(kind, name)
            return found if found and found["metadata"]["uid"] != old["metadata"]["uid"] else None

        return wait_for(f"a new {kind}", new, 90, evidence=self.program.evidence)


@pytest.fixture(scope="module")
def release(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnObjects]:
    """Apply the rendered chart without the kinds that Argo CD leaves out, and start the operator of that release."""
    cluster, chart = installed.cluster, str(REPOSITORY / "charts/finetune-operator")
    values = json.dumps({"replicas": 0, "crds": {"enabled": False}})
    text = cluster.helm("template", ACCOUNT, chart, "-n", NAMESPACE, "--values", "-", stdin=values)
    objects = [item for item in yaml.safe_load_all(text) if item and not is_excluded(item)]
    cluster.kubectl("create", "namespace", NAMESPACE)
    # kubectl gets no namespace here, because the chart also has cluster-wide objects. Every other object names its
    # namespace itself.
    bundle = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("apply", "-f", "-", stdin=bundle)
    cluster.run(["ip", "address", "replace", f"{ADDRESS}/32", "dev", BRIDGE])
    installed.operator.stop(signal.SIGTERM)
    folder: Path = tmp_path_factory.mktemp("from-git")
    settings = {
        "FINETUNE_POD_IP": ADDRESS,
        "FINETUNE_POD_UID": owner_of_the_slice(installed, "operator", NAMESPACE),
        "FINETUNE_REPORT_PORT": str(REPORT_PORT),
        "FINETUNE_RESYNC_SECONDS": "10",
    }
    program = operator_program(
        cluster, folder, namespace=NAMESPACE, account=ACCOUNT, health_port=HEALTH_PORT, settings=settings
    )
    program.start()
    program.wait_ready()
    yield OwnObjects(cluster, program)
    program.stop(signal.SIGTERM)
    cluster.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=bundle)
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    installed.operator.start()
    installed.operator.wait_ready()


def test_a_release_without_the_kinds_that_argo_cd_leaves_out_runs_a_job(
    release: OwnObjects, installed: Installed, namespace: str
) -> None:
    resources = {"nodes": 1, "gpusPerNode": 16, "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}
    installed.apply(small_job("localhost/busybox:1", resources=resources), namespace)
    job = wait_for(
        "the attempt",
        lambda: next((job for job in [installed.job(namespace)] if job.get("status", {}).get("child")), None),
        60,
        evidence=release.program.evidence,
    )
    assert condition(job, "Accepted")["status"] == "True"
    installed.cluster.kubectl("delete", "finetunejob", "quickstart", "-n", namespace)


def test_a_deleted_lease_comes_back_with_the_same_leader(release: OwnObjects) -> None:
    holder = release.cluster.get("lease", ACCOUNT, "-n", NAMESPACE)["spec"]["holderIdentity"]
    restarts = release.program.restarts
    assert release.comes_back("lease", ACCOUNT)["spec"]["holderIdentity"] == holder
    assert release.program.restarts == restarts, "the leader went on"


def test_a_deleted_certificate_secret_comes_back_with_the_same_authority(release: OwnObjects) -> None:
    name = f"{ACCOUNT}-certificates"
    trusted = release.cluster.get("secret", name, "-n", NAMESPACE)["data"]["ca.crt"]
    assert release.comes_back("secret", name)["data"]["ca.crt"] == trusted, "running attempts trust this authority"


def test_a_deleted_endpoint_slice_comes_back(release: OwnObjects) -> None:
    slice_ = release.comes_back("endpointslice", f"{ACCOUNT}-leader")
    assert slice_["endpoints"][0]["addresses"] == [ADDRESS]


def test_the_operator_reads_no_other_object_of_its_namespace(release: OwnObjects) -> None:
    user = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"

    def may(verb: str, what: str) -> bool:
        question = ["auth", "can-i", verb, what, f"--as={user}", "-n", NAMESPACE]
        program = release.cluster.layout.programs / "kubectl"
        return release.cluster.run([program, *question], check=False).stdout.strip() == "yes"

    assert may("get", f"secrets/{ACCOUNT}-certificates")
    own = [(verb, kind) for verb in ("get", "update", "delete") for kind in ("secrets/other", "leases/other")]
    assert [(verb, what) for verb, what in own if may(verb, what)] == []
    assert [verb for verb in ("list", "watch", "delete") if may(verb, "secrets")] == []
