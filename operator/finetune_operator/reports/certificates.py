"""CA and certificate of the report server: made here, kept in the operator's own Secret.

The CA lives 10 years and goes into every attempt's ConfigMap; the certificate lives 90 days and is renewed after
60. Making and judging are pure functions of the time; `SelfSignedCertificates` reads and writes the Secret.
"""

from __future__ import annotations

import base64
import ipaddress
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube.client import ApiError, KubeClient

CA_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
BACKDATED = timedelta(minutes=10)
"""Certificates begin a little in the past, for nodes whose clocks lag."""

CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"
_SERVED = (CA_CERTIFICATE, CERTIFICATE, KEY)
"""Keys of a Secret that somebody else keeps, in the order of `Serving`."""


class CertificateError(Exception):
    """The operator's Secret is missing or holds nothing that can be used."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What the report server presents, and the CA that its clients trust: PEM texts."""

    ca_certificate: str
    certificate: str
    key: str

    @property
    def expires(self) -> datetime:
        """End of the server certificate."""
        return _ends(self.certificate)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts as they lie in the operator's own Secret."""

    ca_certificate: str
    ca_key: str
    certificate: str
    key: str

    @property
    def serving(self) -> Serving:
        """The part that the server needs."""
        return Serving(self.ca_certificate, self.certificate, self.key)

    def to_data(self) -> dict[str, str]:
        """Return the Secret's data."""
        values = (self.ca_certificate, self.ca_key, self.certificate, self.key)
        names = (CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY)
        return {name: base64.b64encode(text.encode()).decode() for name, text in zip(names, values, strict=True)}


def from_data(data: Mapping[str, str]) -> Certificates | None:
    """Return the certificates of a Secret's data; None where it holds none yet."""
    names = (CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY)
    if not all(data.get(name) for name in names):
        return None
    return Certificates(*(base64.b64decode(data[name]).decode() for name in names))


def renewed(old: Certificates | None, *, hostname: str, now: datetime) -> Certificates:
    """Return certificates that are good now: ``old`` itself, or with a new leaf, or all new."""
    if old is None or _ends(old.ca_certificate) - now < LEAF_LIFETIME:
        ca_key, ca = _make_ca(now)
    else:
        if _ends(old.certificate) - now > RENEW_BEFORE and hostname in _hostnames(old.certificate):
            return old
        loaded = serialization.load_pem_private_key(old.ca_key.encode(), password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise CertificateError("the Secret's ca.key is no elliptic-curve key; empty the Secret's data")
        ca_key, ca = loaded, x509.load_pem_x509_certificate(old.ca_certificate.encode())
    key, certificate = _make_leaf(ca_key, ca, hostname, now)
    return Certificates(_pem(ca), _key_pem(ca_key), _pem(certificate), _key_pem(key))


def server_context() -> ssl.SSLContext:
    """Return the context of the report server, without a certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def load_into(context: ssl.SSLContext, certificates: Serving) -> None:
    """Make ``context`` present the certificate; connections from now on see it, also after a renewal.

    Raises:
        CertificateError: key and certificate don't belong together; ``context`` is as it was.
    """
    # The ssl module loads keys from files only; the folder is the pod's memory-backed /tmp and is removed at once.
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder, CERTIFICATE), Path(folder, KEY)
        certificate.write_text(certificates.certificate, encoding="ascii")
        key.touch(mode=0o600)
        key.write_text(certificates.key, encoding="ascii")
        try:
            # First into one that nobody uses: a pair that fails would leave half of itself in a context that serves.
            server_context().load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            raise CertificateError(f"{KEY} must be the private key of {CERTIFICATE}, both PEM: {error}") from error
        context.load_cert_chain(certificate, key)


class SelfSignedCertificates:
    """Keeps the certificates in the Secret that the chart created empty."""

    def __init__(self, cluster: KubeClient, *, namespace: str, name: str, hostname: str) -> None:
        """Use the Secret ``namespace/name`` for a server called ``hostname``."""
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._hostname = hostname

    async def current(self, now: datetime) -> Serving:
        """Return good certificates, made or renewed where needed; raises CertificateError without the Secret."""
        return (await self.ensure(now)).serving

    async def ensure(self, now: datetime) -> Certificates:
        """Return all that the Secret holds, made or renewed where needed; raises CertificateError without it."""
        secret = await self._cluster.get_secret(self._namespace, self._name)
        if secret is None:
            raise CertificateError(f"Secret {self._namespace}/{self._name} must exist; the chart creates it")
        old = from_data(secret.get("data") or {})
        new = renewed(old, hostname=self._hostname, now=now)
        if new == old:
            return new
        try:
            await self._cluster.update_secret({**secret, "data": (secret.get("data") or {}) | new.to_data()})
        except ApiError as error:
            if error.status == 409:
                return await self.ensure(now)  # another replica was faster: use what it wrote
            raise
        return new


class ExternalCertificates:
    """Certificates that somebody else keeps, such as cert-manager: a Secret of type kubernetes.io/tls with ca.crt."""

    def __init__(self, cluster: KubeClient, *, namespace: str, name: str, hostname: str) -> None:
        """Read the Secret ``namespace/name`` for a server called ``hostname``; it is never written."""
        self._cluster = cluster
        self._where = f"Secret {namespace}/{name}"
        self._namespace = namespace
        self._name = name
        self._hostname = hostname

    async def current(self, now: datetime) -> Serving:
        """Return what the Secret holds; raises CertificateError where it can't serve ``hostname`` now."""
        secret = await self._cluster.get_secret(self._namespace, self._name)
        data = (secret or {}).get("data") or {}
        missing = [name for name in _SERVED if not data.get(name)]
        if missing:
            raise CertificateError(f"{self._where} must exist and hold {', '.join(missing)}")
        try:
            serving = Serving(*(base64.b64decode(data[name]).decode("ascii") for name in _SERVED))
            x509.load_pem_x509_certificates(serving.ca_certificate.encode())
            hostnames = _hostnames(serving.certificate)
        except (ValueError, x509.ExtensionNotFound) as error:
            both = f"{CA_CERTIFICATE} and {CERTIFICATE} must be PEM certificates, the latter with host names"
            raise CertificateError(f"{self._where}: {both}") from error
        if self._hostname not in hostnames:
            raise CertificateError(f"{self._where}: {CERTIFICATE} must name {self._hostname}")
        if serving.expires <= now:
            raise CertificateError(f"{self._where}: {CERTIFICATE} ended at {serving.expires.isoformat()}")
        return serving


def _make_ca(now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator reports")])
    certificate = (
        _builder(name, name, key.public_key(), now, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _make_leaf(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, hostname: str, now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _builder(name, ca.subject, key.public_key(), now, LEAF_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_general_name(hostname)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return key, certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _ends(pem: str) -> datetime:
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc


def _hostnames(pem: str) -> list[str]:
    extension = x509.load_pem_x509_certificate(pem.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return [*extension.value.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def _general_name(hostname: str) -> x509.GeneralName:
    """Return the name as a DNS name, or as an address for an operator outside the cluster."""
    try:
        return x509.IPAddress(ipaddress.ip_address(hostname))
    except ValueError:
        return x509.DNSName(hostname)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
