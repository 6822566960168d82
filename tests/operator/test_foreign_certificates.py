"""The certificate of the report server as cert-manager keeps it, by the chart's value: it comes late, is renewed, and
one day another authority signs it. cert-manager itself is not here: the test writes the Secret as it does."""

from __future__ import annotations

import json
import os
import signal
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from finetune_core.contract import CA_FILE, report_path
from tests.cluster import Cluster, wait_for
from tests.cluster.api import answers
from tests.cluster.audit import calls
from tests.cluster.layout import BRIDGE
from tests.cluster.pki import begin, key_usage
from tests.operator.conftest import Installed, small_job
from tests.operator.programs import OperatorProgram, operator_program
from tests.operator.test_on_cluster import RUNS, child_name, pods_run, report, running
from tests.operator.test_reports_on_cluster import token_of
from tests.operator.test_two_replicas import owner_of_the_slice, post_by_name
from tests.operator.worlds import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(400)]

StandIn = Callable[[str], str]
RELEASE = SPACE = "issued"
ACCOUNT = f"{RELEASE}-finetune-operator"
SERVICE = f"{ACCOUNT}.{SPACE}.svc"
SECRET = "reports-tls"
ADDRESS = "10.251.0.11"
REPORT_PORT, HEALTH_PORT = 18643, 18680
RESYNC_SECONDS = 5
LIFETIME = timedelta(days=90)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Signer:
    """A root with one intermediate below it, whose key signs: a CA issuer as companies have them."""

    name: str
    root_key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))

    def __post_init__(self) -> None:
        root, below = _name(f"{self.name} root"), _name(f"{self.name} issuing")
        self.root = self._authority(root, root, self.root_key, None)
        self.certificate = self._authority(below, root, self.key, 0)

    def _authority(self, subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, below: int | None) -> str:
        return _signed(
            begin(subject, issuer, key, LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
            .add_extension(key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_authority_of(self.root_key), critical=False),
            self.root_key,
        )

    def issue(self, host: str) -> dict[str, str]:
        """Return a Secret's data for a new key: names without a subject, the chain below the root, the root beside."""
        key = rsa.generate_private_key(65537, 2048)
        leaf = _signed(
            begin(x509.Name([]), _name(f"{self.name} issuing"), key, LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signs_certificates=False), critical=True)
            .add_extension(_authority_of(self.key), critical=False),
            self.key,
        )
        pkcs1 = serialization.PrivateFormat.TraditionalOpenSSL
        secret = key.private_bytes(serialization.Encoding.PEM, pkcs1, serialization.NoEncryption()).decode()
        return {"tls.crt": leaf + self.certificate, "tls.key": secret, "ca.crt": self.root}


def _signed(builder: x509.CertificateBuilder, key: rsa.RSAPrivateKey) -> str:
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _authority_of(key: rsa.RSAPrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def write_secret(cluster: Cluster, data: dict[str, str]) -> None:
    """Write the Secret as cert-manager's issuing controller does: applied by the server, under its own name."""
    metadata = {
        "name": SECRET,
        "namespace": SPACE,
        "labels": {"controller.cert-manager.io/fao": "true"},
        "annotations": {
            "cert-manager.io/certificate-name": "reports",
            "cert-manager.io/alt-names": SERVICE,
            "cert-manager.io/issuer-kind": "ClusterIssuer",
            "cert-manager.io/issuer-name": "company",
        },
    }
    encoded = {name: b64encode(text.encode()).decode() for name, text in data.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": metadata, "data": encoded}
    by = ["--server-side", "--field-manager=cert-manager-certificates-issuing"]
    cluster.kubectl("apply", *by, "-f", "-", stdin=json.dumps(secret))


@pytest.fixture
def program(installed: Installed, tmp_path: Path) -> Iterator[OperatorProgram]:
    """A release that gets its certificate from the Secret, which is not there yet; its operator is not started."""
    cluster = installed.cluster
    certificate = {"existingSecret": SECRET}
    values = {"replicas": 0, "crds": {"enabled": False}, "reports": {"certificate": certificate, "port": REPORT_PORT}}
    chart = str(REPOSITORY / "charts/finetune-operator")
    install = ["install", RELEASE, chart, "-n", SPACE, "--create-namespace", "--values", "-"]
    cluster.helm(*install, stdin=json.dumps(values))
    cluster.run(["ip", "address", "replace", f"{ADDRESS}/32", "dev", BRIDGE])
    installed.operator.stop(signal.SIGTERM)
    (container,) = cluster.get("deployment", ACCOUNT, "-n", SPACE)["spec"]["template"]["spec"]["containers"]
    chosen = {item["name"]: item.get("value", "") for item in container["env"]}
    program = operator_program(
        cluster,
        tmp_path,
        namespace=SPACE,
        account=ACCOUNT,
        health_port=HEALTH_PORT,
        name=RELEASE,
        settings={
            # What the value made of the Deployment is what counts here.
            **{name: chosen[name] for name in ("FINETUNE_CERTIFICATE_SECRET", "FINETUNE_CERTIFICATE_FROM")},
            "FINETUNE_POD_IP": ADDRESS,
            "FINETUNE_POD_UID": owner_of_the_slice(installed, RELEASE, SPACE),
            "FINETUNE_REPORT_PORT": str(REPORT_PORT),
            "FINETUNE_RESYNC_SECONDS": str(RESYNC_SECONDS),
        },
    )
    yield program
    program.stop(signal.SIGTERM)
    installed.operator.start()
    installed.operator.wait_ready()
    cluster.helm("uninstall", RELEASE, "-n", SPACE)
    cluster.kubectl("delete", "namespace", SPACE, "--wait=false")


def presented(cluster: Cluster) -> str:
    """Return the certificate that the report server presents now; empty while nobody answers."""
    with cluster.enter():
        try:
            return ssl.get_server_certificate((ADDRESS, REPORT_PORT), timeout=5)
        except OSError:
            return ""


def leaf_of(data: dict[str, str]) -> str:
    return data["tls.crt"].partition("-----END CERTIFICATE-----")[0]


def until_presented(program: OperatorProgram, cluster: Cluster, data: dict[str, str]) -> float:
    """Wait until the server presents what ``data`` holds and return the seconds that it took."""
    began = time.monotonic()
    wait_for(
        "the certificate to be presented",
        lambda: leaf_of(data).strip() in presented(cluster),
        60,
        evidence=program.evidence,
        interval=0.2,
    )
    return time.monotonic() - began


def test_a_certificate_that_cert_manager_keeps_is_waited_for_served_and_exchanged(
    program: OperatorProgram, installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    cluster, host, company = installed.cluster, SERVICE, Signer("company")
    program.start()
    missing = f"Secret {SPACE}/{SECRET} must exist and hold ca.crt, tls.crt, tls.key"
    wait_for(
        "the missing Secret to be named", lambda: missing in program.log.read_text(), 60, evidence=program.evidence
    )
    with cluster.enter():
        assert not answers(f"http://127.0.0.1:{HEALTH_PORT}/readyz"), "an operator that can't take reports is not ready"
        assert answers(f"http://127.0.0.1:{HEALTH_PORT}/healthz"), "nor is it to be killed"
    first = company.issue(host)
    write_secret(cluster, first)
    until_presented(program, cluster, first)
    program.wait_ready()
    process = program.pid

    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    pod = job["status"]["attempts"]["current"]["pods"][0]
    token = token_of(installed, namespace, pod["name"], program.evidence)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    trusted = trust_of(installed, namespace, job, 1)
    assert trusted == first["ca.crt"]

    def posted(attempt: int, pod: dict[str, Any], token: str, ca: str) -> int:
        path, body = report_path(namespace, "quickstart", attempt), report(pod["uid"]).to_json()
        return post_by_name(cluster, f"{host}:{REPORT_PORT}", path, body, token, ca)

    def taken() -> bool:
        try:
            return posted(1, pod, token, trusted) == 204
        except OSError:
            return False  # the name leads nowhere yet

    wait_for("a report to be taken", taken, 60, evidence=program.evidence)

    renewed = company.issue(host)
    write_secret(cluster, renewed)
    took = until_presented(program, cluster, renewed)
    print(f"a renewed certificate is presented after {took:.1f} s (load {os.getloadavg()[0]:.1f})")
    assert posted(1, pod, token, trusted) == 204, "the attempt that runs trusts what signed the new one too"

    # One that can't serve, such as a mistaken Certificate makes, takes nothing away.
    write_secret(cluster, company.issue("elsewhere.example.com"))
    refusal = f"tls.crt must name {host}"
    wait_for("the refusal", lambda: refusal in program.log.read_text(), 60, evidence=program.evidence)
    assert posted(1, pod, token, trusted) == 204

    successor = Signer("successor").issue(host)
    write_secret(cluster, successor)
    until_presented(program, cluster, successor)
    with pytest.raises(ssl.SSLCertVerificationError):
        posted(1, pod, token, trusted)
    cluster.kubectl("delete", "pod", pod["name"], "-n", namespace, "--wait=false")
    second = lambda job: job["status"]["attempts"]["started"] == 2 and running(job)  # noqa: E731
    job = installed.wait(namespace, "attempt 2", second, 120)
    pod = job["status"]["attempts"]["current"]["pods"][0]
    token = token_of(installed, namespace, pod["name"], program.evidence)
    assert trust_of(installed, namespace, job, 2) == successor["ca.crt"]
    assert posted(2, pod, token, successor["ca.crt"]) == 204

    assert program.pid == process, "nothing of it needed a restart"
    user = f"system:serviceaccount:{SPACE}:{ACCOUNT}"
    made = [call for call in calls(cluster.layout.audit_log, user) if call.resource == "secrets"]
    assert {(call.verb, call.name) for call in made} == {("get", SECRET)}, "it is read, and never written"


def trust_of(installed: Installed, namespace: str, job: dict[str, Any], attempt: int) -> str:
    """Return the authority that the pods of an attempt trust."""
    found = installed.cluster.get("configmap", child_name(job, attempt), "-n", namespace)
    return str(found["data"][Path(CA_FILE).name])
