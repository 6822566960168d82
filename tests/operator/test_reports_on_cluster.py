"""Tests of the report server with a real API server: tokens that must be rejected, and a renewal of the certificate."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from finetune_core.contract import TOKEN_FILE, report_audience
from finetune_operator.reports.certificates import LEAF_LIFETIME, from_secret_data, renew_if_due
from tests.cluster import wait_for
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.until_term import RUNS
from tests.operator.conftest import (
    HEALTH_PORT,
    OPERATOR_NAMESPACE,
    REPORT_PORT,
    SERVICE_ACCOUNT,
    Installed,
    small_job,
)
from tests.operator.test_on_cluster import post, report, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

StandIn = Callable[[str], str]


def signed(token: str, key_file: Path, **changes: Any) -> str:
    """Return ``token`` with changed claims, signed with the cluster's service account key."""
    header, claims, _ = token.split(".")
    new = json.loads(_decoded(claims)) | changes
    body = f"{header}.{_encoded(json.dumps(new).encode())}"
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return f"{body}.{_encoded(key.sign(body.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _decoded(part: str) -> bytes:
    return urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _encoded(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def refused(installed: Installed) -> dict[str, float]:
    """Return the number of rejected reports for each HTTP status, from the operator's metrics."""
    with (
        installed.cluster.enter(),
        urllib.request.urlopen(f"http://127.0.0.1:{HEALTH_PORT}/metrics", timeout=5) as answer,
    ):
        lines = answer.read().decode().splitlines()
    name = "finetune_reports_refused_total{code="
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith(name)}


def test_expired_tokens_other_jobs_and_earlier_attempts_are_refused_counted_and_never_shown(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    kubectl, key = installed.cluster.kubectl, installed.cluster.layout.certificates / "service-account.key"
    other = small_job(stand_in(RUNS))
    other["metadata"] = {"name": "other"}
    installed.apply(other, namespace)
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    stranger = installed.wait(namespace, "both pods of the other", running, 90, "other")

    def exec_token(pod: str) -> str:
        return token_of(installed, namespace, pod)

    def first_pod(job: dict[str, Any]) -> dict[str, Any]:
        return dict(job["status"]["attempts"]["current"]["pods"][0])

    token, uid = exec_token(first_pod(job)["name"]), first_pod(job)["uid"]
    body, now = report(uid).to_json(), int(time.time())
    before = refused(installed)
    expired = signed(token, key, iat=now - 7200, nbf=now - 7200, exp=now - 3600)
    assert post(installed, namespace, expired, body) == 401
    foreign = exec_token(first_pod(stranger)["name"])
    assert post(installed, namespace, foreign, body) == 401, "another job's token has another audience"
    audience = report_audience(job["metadata"]["uid"])
    assert post(installed, namespace, signed(foreign, key, aud=[audience]), body) == 403, "another job's pod"
    forged = signed(token, key, exp=now + 7200)[:-8] + "AAAAAAAA"
    assert post(installed, namespace, forged, body) == 401
    assert post(installed, namespace, token, "{") == 422
    assert installed.job(namespace)["status"].get("progress") is None

    kubectl("delete", "pod", first_pod(job)["name"], "-n", namespace, "--wait=false", "--force", "--grace-period=0")
    job = installed.wait(
        namespace, "attempt 2", lambda job: job["status"]["attempts"]["started"] == 2 and running(job), 120
    )
    # The token became invalid when its pod was deleted, but the operator may have cached the TokenReview for a minute.
    assert post(installed, namespace, token, body) in (401, 409)
    assert post(installed, namespace, token, body, attempt=2) in (401, 403)
    fresh, uid = exec_token(first_pod(job)["name"]), first_pod(job)["uid"]
    assert post(installed, namespace, fresh, report(uid).to_json(), attempt=1) == 409
    assert installed.job(namespace)["status"].get("progress") is None
    after = refused(installed)
    counted = {code: after[code] - before.get(code, 0) for code in ("401", "403", "409", "422")}
    assert sum(counted.values()) == 8
    assert all(counted.values())
    # This token has valid claims, is signed with the same key, and is accepted. So the expired token, and the token of
    # the other job's pod for this job's audience, were rejected because of their claims.
    assert post(installed, namespace, signed(fresh, key, exp=now + 7200), report(uid).to_json(), attempt=2) == 204


def token_of(installed: Installed, namespace: str, pod: str, evidence: Callable[[], str] = str) -> str:
    """Wait until the pod runs and return its report token; a failure shows the last error of kubectl."""
    refusals: list[str] = []

    def read() -> str:
        done = installed.cluster.run(
            [installed.cluster.layout.programs / "kubectl", "exec", pod, "-n", namespace, "--", "cat", TOKEN_FILE],
            check=False,
        )
        refusals.append(done.stderr)
        return done.stdout if done.returncode == 0 else ""

    def why() -> str:
        return f"{refusals[-1]} ({len(refusals)} tries)\n{installed.evidence(namespace)}\n{evidence()}"

    return wait_for(f"{pod} to give its token", read, 60, evidence=why)


def presented(installed: Installed) -> str:
    """Return the certificate (PEM) that the report server presents."""
    with installed.cluster.enter():
        return ssl.get_server_certificate((HOST_ADDRESS, REPORT_PORT))


def ending_in(days: int, data: dict[str, str]) -> dict[str, str]:
    """Return the Secret's ``data`` with another server certificate. It is signed by the same CA, and expires in
    ``days`` days."""
    then = datetime.now(UTC) - LEAF_LIFETIME + timedelta(days=days)
    old = from_secret_data(data)
    assert old is not None
    elsewhere = renew_if_due(old, hostname="elsewhere", now=then)
    return renew_if_due(elsewhere, hostname=HOST_ADDRESS, now=then).to_data()


@pytest.mark.long
def test_a_certificate_near_its_end_is_renewed_while_the_server_runs(installed: Installed) -> None:
    place = [f"{SERVICE_ACCOUNT}-certificates", "-n", OPERATOR_NAMESPACE]

    def stored() -> dict[str, str]:
        return dict(installed.cluster.get("secret", *place)["data"])

    process, before, data = installed.operator.pid, presented(installed), stored()
    ending = ending_in(10, data)
    installed.cluster.kubectl("patch", "secret", *place, "--type=merge", "-p", json.dumps({"data": ending}))
    wait_for(
        "a new certificate in the Secret", lambda: stored()["tls.crt"] not in (ending["tls.crt"], data["tls.crt"]), 120
    )
    wait_for("the server to present it", lambda: presented(installed) != before, 60)
    assert presented(installed).strip() == b64decode(stored()["tls.crt"]).decode().strip()
    assert installed.operator.pid == process
    assert stored()["ca.crt"] == data["ca.crt"], "attempts that run still trust it"
