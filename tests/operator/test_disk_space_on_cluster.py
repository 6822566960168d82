"""Tests on a real cluster of the volumes that pods write to: the API server accepts the pods in a namespace with the
Pod Security level `restricted` and a quota on `ephemeral-storage`, and the kubelet mounts the volumes writable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_core.contract import MODEL_CACHE_FOLDER, MODEL_VOLUME_FOLDER, SCRATCH_FOLDER, Outcome
from finetune_core.contract.preflight_result import InputSizes, PreflightResult
from tests.cluster import wait_for
from tests.cluster.until_term import RUNS
from tests.operator.builders import result
from tests.operator.conftest import Installed, condition, settled, small_job
from tests.operator.test_on_cluster import StandIn
from tests.operator.test_preflight_on_cluster import ONE_POD, RUN, named

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Manifest = dict[str, Any]
DONE = result(Outcome.COMPLETED, "done", with_artifact=True)
GIB = 1 << 30
CHECKED = PreflightResult(findings=[], sizes=InputSizes(model_bytes=3 * GIB, data_bytes=GIB)).to_termination_message()
STORAGE = {"uri": "s3://bucket/runs", "endpoint": "http://store:9000"}


def then(*commands: str, last: str = f"echo -n '{DONE}' > /dev/termination-log") -> str:
    """Return the script of an image whose check passes, and whose training runs ``commands`` and then ``last``."""
    checked = f"echo -n '{CHECKED}' > /dev/termination-log; exit 0"
    return f'if [ "$0" = preflight ]; then {checked}; fi; {" && ".join(commands)} || exit 64; {last}'


def volume(name: str, folder: str, *, storage_class: str = "", claim: tuple[str, str] | None = None) -> Manifest:
    """Return the manifest of a PersistentVolume of type hostPath: a pod that mounts the volume sees the folder
    ``folder`` of its own node. With ``claim`` (namespace and name) only this PersistentVolumeClaim can bind the
    volume."""
    spec: Manifest = {
        "capacity": {"storage": "4Gi"},
        "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
        "storageClassName": storage_class,
        "hostPath": {"path": folder},
    }
    if claim is not None:
        spec["claimRef"] = dict(zip(("namespace", "name"), claim, strict=True))
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}


@pytest.fixture
def folders(installed: Installed, namespace: str) -> Iterator[list[str]]:
    """Two folders of the node, to which the user of the pods may write. A test may make the PersistentVolumes
    NAMESPACE-0 and NAMESPACE-1 for these folders. The fixture removes these volumes at the end."""
    made = [f"/var/tmp/{namespace}-{number}" for number in range(2)]
    installed.cluster.run(["install", "-d", "-o", "65532", "-m", "0755", *made])
    yield made
    names = [f"{namespace}-{number}" for number in range(2)]
    installed.cluster.kubectl("delete", "pv", "--ignore-not-found", "--wait=false", *names)


def pods_of(installed: Installed, namespace: str) -> list[Manifest]:
    found: list[Manifest] = installed.cluster.get("pods", "-n", namespace)["items"]
    return found


def test_a_cache_on_the_disk_of_the_node_is_shared_by_jobs_and_a_quota_on_the_disk_is_met(
    installed: Installed, namespace: str, stand_in: StandIn, folders: list[str]
) -> None:
    quota = {"requests.ephemeral-storage": "20Gi", "limits.ephemeral-storage": "80Gi"}
    installed.apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "disk"}, "spec": {"hard": quota}}, namespace
    )
    disk = volume(f"{namespace}-0", folders[0], claim=(namespace, "models"))
    installed.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(disk))
    claim: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": f"{namespace}-0",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    installed.apply(claim, namespace)
    storage = STORAGE | {"cache": {"claimName": "models"}}

    writes = then(f"echo weights > {MODEL_CACHE_FOLDER}/kept", f"echo x > {SCRATCH_FOLDER}/x")
    first = small_job(stand_in(writes), resources=ONE_POD, runPolicy=RUN, storage=storage)
    installed.apply(named("first", first), namespace)
    job = installed.wait(namespace, "the first job to end", settled, 120, "first")
    assert condition(job, "Succeeded")["reason"] == "Completed", job["status"]
    assert (job["status"]["preflight"]["modelBytes"], job["status"]["preflight"]["dataBytes"]) == (3 * GIB, GIB)

    # The second job sets `resources.scratch.size`, and finds the file that the first job left in the cache.
    reads = then(f"test -s {MODEL_CACHE_FOLDER}/kept", last=RUNS)
    sized = ONE_POD | {"scratch": {"size": "9Gi"}}
    second = small_job(stand_in(reads), resources=sized, runPolicy=RUN, storage=storage)
    installed.apply(named("second", second), namespace)

    def runs() -> bool:
        return any(
            pod["status"]["phase"] == "Running" and "preflight" not in pod["metadata"]["name"]
            for pod in pods_of(installed, namespace)
        )

    wait_for("the second job to run", runs, 120)
    (pod,) = [pod for pod in pods_of(installed, namespace) if pod["status"]["phase"] == "Running"]
    amounts = pod["spec"]["containers"][0]["resources"]
    assert amounts["requests"]["ephemeral-storage"] == amounts["limits"]["ephemeral-storage"] == "11Gi"
    (scratch,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "scratch"]
    assert scratch["emptyDir"] == {"sizeLimit": "9Gi"}
    used = installed.cluster.get("resourcequota", "disk", "-n", namespace)["status"]["used"]
    assert used["requests.ephemeral-storage"] == "11Gi"


def test_a_scratch_folder_and_a_model_on_volumes_of_the_pod_are_writable(
    installed: Installed, namespace: str, stand_in: StandIn, folders: list[str]
) -> None:
    for number, folder in enumerate(folders):
        disk = volume(f"{namespace}-{number}", folder, storage_class=f"fast-{namespace}")
        installed.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(disk))
    own = {"size": "4Gi", "storageClassName": f"fast-{namespace}"}
    writes = then(f"echo x > {MODEL_VOLUME_FOLDER}/x", f"echo x > {SCRATCH_FOLDER}/x")
    job = small_job(
        stand_in(writes),
        resources=ONE_POD | {"scratch": own},
        runPolicy=RUN,
        storage=STORAGE | {"cache": {"ephemeral": own}},
    )
    installed.apply(job, namespace)
    ended = installed.wait(namespace, "the job to end", settled, 120)
    assert condition(ended, "Succeeded")["reason"] == "Completed", ended["status"]


def test_pods_that_wait_for_a_volume_say_so(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    scratch = {"size": "4Gi", "storageClassName": "no-such-class"}
    job = small_job(stand_in(then("true")), resources=ONE_POD | {"scratch": scratch}, runPolicy=RUN)
    installed.apply(job, namespace)

    def told(job: Manifest) -> bool:
        return "unbound immediate PersistentVolumeClaims" in condition(job, "Succeeded")["message"]

    installed.wait(namespace, "the sentence", told, 120)
