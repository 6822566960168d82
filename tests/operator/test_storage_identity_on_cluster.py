"""The token of `storage.identity` on the real cluster: for whom it is valid, and for whom it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_core.contract import report_audience
from finetune_core.contract.pod import WEB_IDENTITY_FILE
from tests.cluster import ClusterError, wait_for
from tests.operator.conftest import Installed, small_job
from tests.operator.test_on_cluster import RUNS, post, report, running
from tests.operator.test_two_replicas import StandIn

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def storage(**identity: Any) -> dict[str, Any]:
    return {"uri": "s3://finetune/runs", "endpoint": "http://minio.minio.svc:9000", "identity": identity}


def reviewed(installed: Installed, token: str, audience: str) -> dict[str, Any]:
    """Return `status` of a TokenReview of ``token`` for ``audience``, as a store in the cluster could ask for it."""
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    }
    text = installed.cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(review))
    found: dict[str, Any] = json.loads(text)["status"]
    return found


def test_the_pods_get_a_token_for_the_store_that_nobody_else_accepts(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS), storage=storage(audience="minio")), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    pod = job["status"]["attempts"]["current"]["pods"][0]

    def read() -> str:
        command = ["exec", pod["name"], "-n", namespace, "--", "sh", "-c", 'cat "$AWS_WEB_IDENTITY_TOKEN_FILE"']
        kubectl = installed.cluster.layout.programs / "kubectl"
        done = installed.cluster.run([kubectl, *command], check=False)
        return done.stdout if done.returncode == 0 else ""

    token = wait_for("the pod to give its token", read, 60, evidence=lambda: installed.evidence(namespace))
    accepted = reviewed(installed, token, "minio")
    assert accepted["authenticated"] is True
    assert accepted["user"]["username"] == f"system:serviceaccount:{namespace}:default"
    for audience in (report_audience(job["metadata"]["uid"]), "https://kubernetes.default.svc"):
        assert not reviewed(installed, token, audience).get("authenticated")
    assert post(installed, namespace, token, report(pod["uid"]).to_json()) == 401
    assert WEB_IDENTITY_FILE == "/var/run/secrets/finetune.dev/identity/token"


@pytest.mark.parametrize("audience", ["finetune.dev/1234", "https://kubernetes.default.svc.cluster.local", "a b", ""])
def test_an_audience_of_the_operator_or_of_the_api_server_is_refused(
    installed: Installed, namespace: str, audience: str
) -> None:
    with pytest.raises(ClusterError, match="audience"):
        installed.apply(small_job("localhost/busybox:1", storage=storage(audience=audience)), namespace)


def test_a_secret_and_an_identity_exclude_each_other(installed: Installed, namespace: str) -> None:
    both = storage(audience="minio") | {"credentialsSecretRef": {"name": "storage-credentials"}}
    with pytest.raises(ClusterError, match="at most one of"):
        installed.apply(small_job("localhost/busybox:1", storage=both), namespace)


def test_the_api_server_refuses_a_control_character_in_an_address(installed: Installed, namespace: str) -> None:
    hostile = storage(audience="minio") | {"uri": "s3://finetune/a\x9b2J"}
    with pytest.raises(ClusterError, match="uri"):
        installed.apply(small_job("localhost/busybox:1", storage=hostile), namespace)
