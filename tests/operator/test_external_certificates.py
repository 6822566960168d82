"""The report server with a certificate from an existing Secret (`reports.certificate.existingSecret` of the chart).

The Secret is created late, is renewed, gets an invalid certificate, and at last a certificate of another CA. The test
writes the Secret as cert-manager does, with an intermediate CA. In `test_cert_manager.py` cert-manager itself writes
the Secret.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.cluster import Cluster
from tests.cluster.pki import begin, key_usage
from tests.cluster.until_term import RUNS
from tests.operator.conftest import Installed, small_job
from tests.operator.external_certificates import SECRET, Release, installed_release

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(400)]

StandIn = Callable[[str], str]
NAMESPACE = "issued"
LIFETIME = timedelta(days=90)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Signer:
    """A root CA and an intermediate CA, as many companies have them. The intermediate CA signs server certificates."""

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
        """Return the data of a Secret with a new key and certificate for ``host``.

        `tls.crt` has an empty subject and includes the intermediate CA; `ca.crt` is the root CA.
        """
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


def write_secret(cluster: Cluster, host: str, data: dict[str, str]) -> None:
    """Write the Secret by server-side apply with the field manager, labels and annotations of cert-manager."""
    metadata = {
        "name": SECRET,
        "namespace": NAMESPACE,
        "labels": {"controller.cert-manager.io/fao": "true"},
        "annotations": {
            "cert-manager.io/certificate-name": "reports",
            "cert-manager.io/alt-names": host,
            "cert-manager.io/issuer-kind": "ClusterIssuer",
            "cert-manager.io/issuer-name": "company",
        },
    }
    encoded = {name: b64encode(text.encode()).decode() for name, text in data.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": metadata, "data": encoded}
    by = ["--server-side", "--field-manager=cert-manager-certificates-issuing"]
    cluster.kubectl("apply", *by, "-f", "-", stdin=json.dumps(secret))


@pytest.fixture
def release(installed: Installed, tmp_path: Path) -> Iterator[Release]:
    with installed_release(installed, tmp_path, NAMESPACE, NAMESPACE) as release:
        yield release


def test_a_certificate_that_somebody_keeps_is_waited_for_served_and_exchanged(
    release: Release, installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    cluster, host, company = installed.cluster, release.host, Signer("company")
    release.start_without_a_certificate()
    first = company.issue(host)
    write_secret(cluster, host, first)
    release.until_presented(first["tls.crt"])
    release.program.wait_ready()
    process = release.program.pid

    installed.apply(small_job(stand_in(RUNS)), namespace)
    attempt = release.attempt(namespace, 1)
    assert attempt.trusted == first["ca.crt"]
    attempt.until_taken()

    renewed = company.issue(host)
    write_secret(cluster, host, renewed)
    took = release.until_presented(renewed["tls.crt"])
    print(f"a renewed certificate is presented after {took:.1f} s (load {os.getloadavg()[0]:.1f})")
    assert attempt.post() == 204, "the running attempt trusts the CA that signed the renewed certificate"

    # The server does not load a certificate for another host. A Certificate object with a wrong host name would produce
    # such a certificate.
    write_secret(cluster, host, company.issue("elsewhere.example.com"))
    release.until_logged(f"tls.crt must name {host}")
    assert attempt.post() == 204

    successor = Signer("successor").issue(host)
    write_secret(cluster, host, successor)
    release.until_presented(successor["tls.crt"])
    attempt.assert_only_the_next_one_trusts(successor["ca.crt"])

    assert release.program.pid == process, "no renewal needed a restart"
    assert release.reads_of_secrets() == {("get", SECRET)}, "the Secret is read and never written"
