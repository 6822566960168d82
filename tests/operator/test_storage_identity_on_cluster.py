"""The token of `storage.identity` on the real cluster: MinIO accepts it, the operator and the API server do not.

MinIO is set up as docs/storage.md says. It accepts the token of a real pod and returns an access key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import report_audience
from finetune_core.contract.pod import WEB_IDENTITY_FILE
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.client import Store
from tests.cluster import ClusterError, wait_for
from tests.cluster.layout import API_URL
from tests.cluster.until_term import RUNS
from tests.operator.conftest import Installed, small_job
from tests.operator.test_on_cluster import post, report, running
from tests.operator.test_two_replicas import StandIn
from tests.trainer.objectstore import BUCKET, ObjectStore, minio_binary, running_store
from tests.trainer.test_store_dialects import CLUSTER_AUDIENCE, CLUSTER_ROLE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def storage(**identity: Any) -> dict[str, Any]:
    return {"uri": "s3://finetune/runs", "endpoint": "http://minio.minio.svc:9000", "identity": identity}


def identity_token(installed: Installed, namespace: str, pod: str) -> str:
    """Wait until the pod runs, and return the token in the file that `AWS_WEB_IDENTITY_TOKEN_FILE` of the pod names."""

    def read() -> str:
        command = ["exec", pod, "-n", namespace, "--", "sh", "-c", 'cat "$AWS_WEB_IDENTITY_TOKEN_FILE"']
        done = installed.cluster.run([installed.cluster.layout.programs / "kubectl", *command], check=False)
        return done.stdout if done.returncode == 0 else ""

    return wait_for("the pod to give its token", read, 60, evidence=lambda: installed.evidence(namespace))


@pytest.fixture
def trusting_store(installed: Installed, tmp_path: Path) -> Iterator[ObjectStore]:
    """A MinIO in the cluster's network that trusts the cluster as an OpenID provider, as docs/storage.md sets it up."""
    binary = minio_binary()
    assert binary is not None, "the cluster's tools contain MinIO"
    reader = "clusterrole=system:service-account-issuer-discovery"
    binding = ["clusterrolebinding", "issuer-for-minio"]
    installed.cluster.kubectl("create", *binding, f"--{reader}", "--group=system:unauthenticated")
    trusted = tmp_path / ".minio/certs/CAs"
    trusted.mkdir(parents=True)
    shutil.copy(installed.cluster.layout.certificates / "ca.crt", trusted / "cluster.crt")
    variables = {
        "MINIO_IDENTITY_OPENID_CONFIG_URL_CLUSTER": f"{API_URL}/.well-known/openid-configuration",
        "MINIO_IDENTITY_OPENID_CLIENT_ID_CLUSTER": CLUSTER_AUDIENCE,
        "MINIO_IDENTITY_OPENID_ROLE_POLICY_CLUSTER": "readwrite",
    }
    with installed.cluster.enter(), running_store(binary, tmp_path, variables=variables) as store:
        yield store
    installed.cluster.kubectl("delete", *binding)


def test_minio_gives_a_key_for_the_token_of_a_real_pod(
    installed: Installed,
    namespace: str,
    stand_in: StandIn,
    trusting_store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = storage(audience=CLUSTER_AUDIENCE, roleArn=CLUSTER_ROLE)
    installed.apply(small_job(stand_in(RUNS), storage=identity), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    pod = job["status"]["attempts"]["current"]["pods"][0]["name"]
    token = tmp_path / "token"
    token.write_text(identity_token(installed, namespace, pod))
    (container,) = installed.cluster.get("pod", pod, "-n", namespace)["spec"]["containers"]
    variables = {item["name"]: item.get("value", "") for item in container["env"] if item["name"].startswith("AWS_")}
    assert variables.pop("AWS_WEB_IDENTITY_TOKEN_FILE") == WEB_IDENTITY_FILE
    assert variables.pop("AWS_ENDPOINT_URL_STS") == "http://minio.minio.svc:9000"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", trusting_store.endpoint)
    with installed.cluster.enter():
        store = Store(trusting_store.endpoint, "us-east-1", None, budget_seconds=0)

        def written() -> bool:
            try:
                store.write(BUCKET, "by-a-pod", b"data")
            except OutsideFailure as failure:
                refusals.append(str(failure))
                return False
            return True

        refusals: list[str] = []
        # MinIO reads the cluster's keys in the background after its start.
        wait_for("MinIO to take the token", written, 60, evidence=lambda: "\n".join(refusals[-3:]))
        assert store.read(BUCKET, "by-a-pod") == b"data"


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
    token = identity_token(installed, namespace, pod["name"])
    accepted = reviewed(installed, token, "minio")
    assert accepted["authenticated"] is True
    assert accepted["user"]["username"] == f"system:serviceaccount:{namespace}:default"
    for audience in (report_audience(job["metadata"]["uid"]), "https://kubernetes.default.svc"):
        assert not reviewed(installed, token, audience).get("authenticated")
    assert post(installed, namespace, token, report(pod["uid"]).to_json()) == 401


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
