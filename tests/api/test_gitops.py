"""The operator changes only the status of a job that a user or a GitOps tool has applied. After the operator has run,
kubectl, Argo CD and Flux find no drift (difference from the applied manifest)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_core.api.conditions import ConditionType
from finetune_core.validation.validate_job import validate_spec
from finetune_operator.kube.client import KubeClient as OperatorClient
from finetune_operator.kube.client import load_configuration
from finetune_operator.objects.backends.pytorchjob import PyTorchJobBackend
from finetune_operator.process.metrics import Metrics
from finetune_operator.process.settings import parse_settings
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.reconcile import Reconciler
from tests.api.server import Server
from tests.cluster import Cluster
from tests.core.jobs import quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

RECONCILES = 6
"""Number of times that the job is reconciled. This number is enough to record attempt 1 in the status, create the
attempt's objects, observe them, and then find nothing more to do."""
GITOPS_MANAGERS = ("argocd-controller", "kustomize-controller")


async def _reconcile(cluster: Cluster, key: Key) -> None:
    arguments = ["--trainer-image=localhost/busybox:1", "--namespace=default", f"--kubeconfig={cluster.kubeconfig}"]
    settings = parse_settings(arguments, {})
    client = OperatorClient(await load_configuration(settings.kubeconfig), fence=lambda: None)
    reconciler = Reconciler(
        cluster=client,
        backend=PyTorchJobBackend(client),
        memory=Memory(),
        metrics=Metrics(),
        trainer_image=settings.trainer_image,
        report_base_url=settings.report_base_url,
        preflight="Skip",
        ca_bundle=lambda: "no certificate",
        instance="test",
    )
    try:
        for _ in range(RECONCILES):
            await reconciler.reconcile(key)
    finally:
        await client.close()


def let_the_operator_run(cluster: Cluster, namespace: str, name: str) -> None:
    """Reconcile the job `RECONCILES` times with the operator's own code, from inside the cluster's network."""
    failures: list[BaseException] = []

    def inside() -> None:
        try:
            with cluster.enter():
                asyncio.run(_reconcile(cluster, Key(namespace, name)))
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
            failures.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def canonical(value: Any) -> str:
    """Return ``value`` as JSON text with sorted keys and without spaces, so that equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@pytest.fixture
def namespace(cluster: Cluster, server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for one test."""
    name = f"gitops-{abs(hash(request.node.name)) % 10**8}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def job() -> dict[str, Any]:
    """Return a job with values that GitOps tools often report as drift: quantities, maps, lists, an empty text and an
    empty section."""
    manifest = quickstart("resources.cpu", "1500m")
    manifest["metadata"] = {"name": "drift", "labels": {"team": "a"}, "annotations": {"note": "1"}}
    manifest["spec"]["resources"] |= {"memory": "6Gi", "sharedMemory": 536870912}
    manifest["spec"]["evaluation"] = {}
    manifest["spec"]["podTemplate"] = {
        "labels": {"b": "1", "a": "2"},
        "env": [{"name": "Z", "value": ""}, {"name": "A", "value": "1"}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "volumes": [{"name": "cache", "mountPath": "/cache", "emptyDir": {"sizeLimit": "1.5Gi"}}],
    }
    return manifest


@pytest.mark.parametrize("server_side", [False, True], ids=["client-side", "server-side"])
def test_no_drift_after_the_operator_has_run(cluster: Cluster, namespace: str, *, server_side: bool) -> None:
    manifest = job()
    text = json.dumps(manifest)
    flags = ["--server-side"] if server_side else []
    apply = ["apply", *flags, "-n", namespace, "-f", "-"]
    assert "created" in cluster.kubectl(*apply, stdin=text) or server_side
    before = cluster.get("ftj", "drift", "-n", namespace)
    let_the_operator_run(cluster, namespace, "drift")
    live = cluster.get("ftj", "drift", "-n", namespace)

    conditions = {condition["type"]: condition for condition in live["status"]["conditions"]}
    assert set(conditions) == {kind.value for kind in ConditionType}
    assert conditions["Accepted"]["status"] == "True"
    assert live["status"]["attempts"]["started"] == 1
    assert len(cluster.get("pytorchjobs", "-n", namespace)["items"]) == 1

    # The stored spec is the applied spec with the schema's defaults, and nothing else. The operator has changed no
    # label, annotation, finalizer or owner reference of the job.
    assert canonical(live["spec"]) == canonical(validate_spec(manifest["spec"]).stored)
    kept = ("labels", "annotations", "finalizers", "generation", "uid", "ownerReferences")
    assert {key: live["metadata"].get(key) for key in kept} == {key: before["metadata"].get(key) for key in kept}
    own = {} if server_side else {"kubectl.kubernetes.io/last-applied-configuration"}
    assert live["metadata"]["annotations"].keys() - own == manifest["metadata"]["annotations"].keys()
    assert "finalizers" not in live["metadata"]

    diff = cluster.run(
        [cluster.layout.programs / "kubectl", "diff", *flags, "-n", namespace, "-f", "-"], stdin=text, check=False
    )
    assert (diff.returncode, diff.stdout) == (0, ""), diff.stderr
    again = cluster.kubectl(*apply, stdin=text)
    assert "unchanged" in again or server_side
    assert (
        cluster.get("ftj", "drift", "-n", namespace)["metadata"]["resourceVersion"]
        == live["metadata"]["resourceVersion"]
    )


@pytest.mark.parametrize("manager", GITOPS_MANAGERS)
def test_argo_cd_and_flux_see_no_drift(cluster: Cluster, namespace: str, manager: str) -> None:
    """Argo CD (with ServerSideDiff) and Flux (in its kustomize-controller) apply a job in a server-side dry run and
    compare the result with the live object. They leave out status and managedFields. This test does the same."""
    text = json.dumps(job())
    apply = ["apply", "--server-side", f"--field-manager={manager}", "-n", namespace, "-f", "-"]
    cluster.kubectl(*apply, stdin=text)
    let_the_operator_run(cluster, namespace, "drift")
    live = cluster.get("ftj", "drift", "-n", namespace)
    predicted = json.loads(cluster.kubectl(*apply, "--dry-run=server", "--output=json", stdin=text))
    for found in (live, predicted):
        found.pop("status", None)
        found["metadata"].pop("managedFields", None)
    assert canonical(predicted) == canonical(live)


def test_a_job_that_can_not_be_run_ends_with_the_fields_path(cluster: Cluster, namespace: str) -> None:
    manifest = job()
    manifest["spec"]["deepspeed"] = {"overrides": "{x"}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))
    let_the_operator_run(cluster, namespace, "drift")
    live = cluster.get("ftj", "drift", "-n", namespace)
    conditions = {condition["type"]: condition for condition in live["status"]["conditions"]}
    assert (conditions["Accepted"]["status"], conditions["Accepted"]["reason"]) == ("False", "BadInput")
    assert conditions["Accepted"]["message"].startswith("spec.deepspeed.overrides: must be JSON")
    assert conditions["Stalled"]["status"] == "True"
    assert cluster.get("pytorchjobs", "-n", namespace)["items"] == []
