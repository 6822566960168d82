"""The report server with a certificate from cert-manager, requested by the YAML in the chart's README.

A ClusterIssuer signs the certificate. The certificate is renewed on request, with another key algorithm, and after a
renewal of the CA.
"""

from __future__ import annotations

import json
import os
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.cluster import Cluster, wait_for
from tests.cluster.cert_manager import cert_manager
from tests.cluster.component import Component
from tests.cluster.until_term import RUNS
from tests.operator.conftest import Installed, small_job
from tests.operator.external_certificates import CHART, SECRET, Release, installed_release

# The time-out is long because the first run builds cert-manager.
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1200)]

StandIn = Callable[[str], str]
ISSUER_NAMESPACE = "cert-manager"
ISSUE_SECONDS = 60
AUTHORITY = f"""
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {{name: root, namespace: {ISSUER_NAMESPACE}}}
spec: {{selfSigned: {{}}}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {{name: company, namespace: {ISSUER_NAMESPACE}}}
spec:
  isCA: true
  commonName: company
  secretName: company-ca
  privateKey: {{algorithm: ECDSA, size: 256, rotationPolicy: Never}}
  issuerRef: {{name: root}}
---
apiVersion: cert-manager.io/v1
kind: ClusterIssuer
metadata: {{name: company}}
spec: {{ca: {{secretName: company-ca}}}}
"""
"""The CA and the ClusterIssuer that a company already has before it installs the chart."""


def certificate_of_the_readme() -> dict[str, Any]:
    """Return the Certificate manifest from the chart's README."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(block)
    return found


class ManagedCertificate:
    """Renews and changes a Certificate object of cert-manager, and reads the Secret that cert-manager writes."""

    def __init__(self, cluster: Cluster, program: Component, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._program = program
        self._name = name
        self._in = ("-n", namespace)

    def data(self) -> dict[str, str]:
        """Return the decoded data of the Certificate's Secret."""
        name = self._certificate()["spec"]["secretName"]
        data = self._cluster.get("secret", name, *self._in)["data"]
        return {key: b64decode(value).decode() for key, value in data.items()}

    def until_issued(self, revision: int) -> dict[str, str]:
        """Wait until cert-manager has issued the certificate ``revision`` times; return the Secret's decoded data."""

        def issued() -> bool:
            status = self._certificate().get("status", {})
            conditions = {item["type"]: item["status"] for item in status.get("conditions", [])}
            return status.get("revision") == revision and conditions == {"Ready": "True"}

        what = f"revision {revision} of Certificate {self._name}"
        wait_for(what, issued, ISSUE_SECONDS, evidence=self._evidence, interval=0.2)
        return self.data()

    def renew(self) -> dict[str, str]:
        """Request a renewal as `cmctl renew` does, and return the decoded data of the Secret after the renewal."""
        revision = self._certificate()["status"]["revision"]
        condition = {"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "by a test"}
        patch = [{"op": "add", "path": "/status/conditions/-", "value": condition}]
        self._patch("--subresource=status", "--type=json", patch)
        return self.until_issued(revision + 1)

    def change(self, private_key: dict[str, Any]) -> None:
        """Set `spec.privateKey`, for example ``{"algorithm": "ECDSA", "size": 256}``."""
        self._patch("--type=merge", {"spec": {"privateKey": private_key}})

    def _patch(self, *arguments: Any) -> None:
        *options, patch = arguments
        self._cluster.kubectl("patch", "certificate", self._name, *self._in, *options, "--patch", json.dumps(patch))

    def _certificate(self) -> dict[str, Any]:
        found: dict[str, Any] = self._cluster.get("certificate", self._name, *self._in)
        return found

    def _evidence(self) -> str:
        kinds = "issuers,clusterissuers,certificates,certificaterequests"
        return self._cluster.kubectl("describe", kinds, *self._in) + self._program.evidence()


def leaf(data: dict[str, str]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(data["tls.crt"].encode())


@pytest.fixture
def issuing(installed: Installed) -> Iterator[Component]:
    """Run cert-manager with the ClusterIssuer of a company."""
    cluster = installed.cluster
    cluster.kubectl("create", "namespace", ISSUER_NAMESPACE)
    with cert_manager(cluster, ISSUER_NAMESPACE) as program:
        cluster.kubectl("apply", "-f", "-", stdin=AUTHORITY)
        ManagedCertificate(cluster, program, ISSUER_NAMESPACE, "company").until_issued(1)
        yield program
    cluster.kubectl("delete", "namespace", ISSUER_NAMESPACE, "--wait=false")


@pytest.fixture
def release(installed: Installed, issuing: Component, tmp_path: Path) -> Iterator[Release]:
    """Install the release with the name and namespace that the README's Certificate is written for."""
    with installed_release(installed, tmp_path, "finetune-operator", "finetune-system") as release:
        yield release


def test_cert_manager_issues_the_certificate_and_renews_it_under_a_running_attempt(
    release: Release, issuing: Component, installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    cluster, wanted = installed.cluster, certificate_of_the_readme()
    assert wanted["spec"]["secretName"] == SECRET
    reports = ManagedCertificate(cluster, issuing, wanted["metadata"]["namespace"], wanted["metadata"]["name"])
    authority = ManagedCertificate(cluster, issuing, ISSUER_NAMESPACE, "company")
    release.start_without_a_certificate()

    began = time.monotonic()
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(wanted))
    first = reports.until_issued(1)
    print_seconds("Certificate applied, issued", began)
    release.until_presented(first["tls.crt"])
    print_seconds("Certificate applied, presented", began)
    release.program.wait_ready()
    print_seconds("Certificate applied, operator ready", began)
    process = release.program.pid

    installed.apply(small_job(stand_in(RUNS)), namespace)
    attempt = release.attempt(namespace, 1)
    assert attempt.trusted == first["ca.crt"] == authority.data()["tls.crt"]
    attempt.until_taken()

    began = time.monotonic()
    renewed = reports.renew()
    release.until_presented(renewed["tls.crt"])
    print_seconds("renewed, presented", began)
    assert leaf(renewed).serial_number != leaf(first).serial_number
    assert isinstance(leaf(renewed).public_key(), rsa.RSAPublicKey)
    assert attempt.post() == 204, "the running attempt trusts the CA that signed the renewed certificate"

    began = time.monotonic()
    reports.change({"algorithm": "ECDSA", "size": 256})
    elliptic = reports.until_issued(3)
    release.until_presented(elliptic["tls.crt"])
    print_seconds("key of another kind, presented", began)
    assert isinstance(leaf(elliptic).public_key(), ec.EllipticCurvePublicKey)
    assert attempt.post() == 204

    # The CA gets a new certificate for its old key, so the CA certificate in the attempt still verifies the server.
    again = authority.renew()
    below = reports.renew()
    assert below["ca.crt"] == again["tls.crt"] != attempt.trusted
    release.until_presented(below["tls.crt"])
    assert attempt.post() == 204

    authority.change({"rotationPolicy": "Always"})
    authority.renew()
    foreign = reports.renew()
    release.until_presented(foreign["tls.crt"])
    attempt.assert_only_the_next_one_trusts(foreign["ca.crt"])

    assert release.program.pid == process, "no renewal needed a restart"
    assert release.reads_of_secrets() == {("get", SECRET)}, "the Secret is read and never written"


def print_seconds(what: str, began: float) -> None:
    print(f"{what}: {time.monotonic() - began:.1f} s (load {os.getloadavg()[0]:.1f})")
