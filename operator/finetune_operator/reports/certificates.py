"""TLS certificates of the report server, made by the operator or read from a Secret that somebody else maintains.

The operator's own CA is valid for 10 years and goes into every attempt's ConfigMap. The server certificate that this CA
signs is valid for 90 days and is renewed 30 days before its end. Functions make and renew certificates without any
access to the cluster. The classes `SelfSignedCertificates` and `ExternalCertificates` access the Secret;
`certificate_reloader.py` calls them.
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
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.resources import SECRETS

CA_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
BACKDATED = timedelta(minutes=10)
"""Time from the beginning of a new certificate's validity to its creation. Nodes whose clocks are slow by up to this
time accept the certificate."""

CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"
_ALL_KEYS = (CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY)
"""Keys in `data` of the operator's own Secret, in the order of the fields of `CertificateSet`."""
_EXTERNAL_KEYS = (CA_CERTIFICATE, CERTIFICATE, KEY)
"""Keys in `data` of a Secret that somebody else maintains, in the order of the fields of `ServingCertificate`."""


class CertificateError(Exception):
    """The certificate Secret is missing, or its content can't be used. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class ServingCertificate:
    """The report server's certificate with its private key, and the CA that clients must trust, as PEM texts."""

    ca_certificate: str
    certificate: str
    key: str

    @property
    def expires(self) -> datetime:
        """End of the validity of the server certificate."""
        return _not_after(self.certificate)


@dataclass(frozen=True, slots=True)
class CertificateSet:
    """CA and server certificate with their private keys, as PEM texts: the content of the operator's own Secret."""

    ca_certificate: str
    ca_key: str
    certificate: str
    key: str

    @property
    def serving(self) -> ServingCertificate:
        """The certificates without the CA's private key. The report server does not need that key."""
        return ServingCertificate(self.ca_certificate, self.certificate, self.key)

    def to_data(self) -> dict[str, str]:
        """Return these certificates and keys as `data` of a Secret: base64 texts by the Secret's keys."""
        values = (self.ca_certificate, self.ca_key, self.certificate, self.key)
        return {name: base64.b64encode(text.encode()).decode() for name, text in zip(_ALL_KEYS, values, strict=True)}


def from_secret_data(data: Mapping[str, str]) -> CertificateSet | None:
    """Return the certificates in ``data``, the `data` of the operator's Secret.

    Return None where one of the four entries is missing, where a value is no PEM of a certificate or of a private key
    without a password, where the server certificate names no host, or where a private key does not belong to its
    certificate. The caller then replaces the content of the Secret.
    """
    if not all(data.get(name) for name in _ALL_KEYS):
        return None
    try:
        found = CertificateSet(*(base64.b64decode(data[name]).decode("ascii") for name in _ALL_KEYS))
        _hostnames(found.certificate)
        fits = _belongs(found.ca_key, found.ca_certificate) and _belongs(found.key, found.certificate)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    return found if fits else None


def renew_if_due(old: CertificateSet | None, *, hostname: str, now: datetime) -> CertificateSet:
    """Return ``old`` where nothing in it is due for renewal, else a renewed set.

    The server certificate is due where it ends within 30 days from ``now``, or is not for ``hostname``. The same CA
    signs the new server certificate. CA and server certificate are both made anew where ``old`` is None, or where the
    CA would end before a new server certificate (90 days).
    """
    if old is None or _not_after(old.ca_certificate) - now < LEAF_LIFETIME:
        ca_key, ca = _make_ca(now)
    else:
        if _not_after(old.certificate) - now > RENEW_BEFORE and hostname in _hostnames(old.certificate):
            return old
        loaded = serialization.load_pem_private_key(old.ca_key.encode(), password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise CertificateError("the Secret's ca.key is no elliptic-curve key; empty the Secret's data")
        ca_key, ca = loaded, x509.load_pem_x509_certificate(old.ca_certificate.encode())
    key, certificate = _make_leaf(ca_key, ca, hostname, now)
    return CertificateSet(_pem(ca), _key_pem(ca_key), _pem(certificate), _key_pem(key))


def server_context() -> ssl.SSLContext:
    """Return a TLS context for the report server (TLS 1.2 or later). No certificate is loaded into it yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def load_certificate(context: ssl.SSLContext, serving: ServingCertificate) -> None:
    """Make ``context`` present the certificate of ``serving`` to all new connections.

    Raises:
        CertificateError: key and certificate don't belong together, or are not PEM. ``context`` is then unchanged.
    """
    # The key is written into a file, because the ssl module loads keys from files only. The pod's /tmp is in memory.
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder, CERTIFICATE), Path(folder, KEY)
        certificate.write_text(serving.certificate, encoding="ascii")
        key.touch(mode=0o600)
        key.write_text(serving.key, encoding="ascii")
        try:
            # The pair is tried in another context first, because a pair that does not match would leave its certificate
            # in ``context``.
            server_context().load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            raise CertificateError(f"{KEY} must be the private key of {CERTIFICATE}, both PEM: {error}") from error
        context.load_cert_chain(certificate, key)


class SelfSignedCertificates:
    """Makes and renews the certificates, and stores them in a Secret. A missing Secret is created."""

    def __init__(self, client: KubeClient, *, namespace: str, name: str, hostname: str) -> None:
        """Store certificates for ``hostname`` in the Secret ``namespace/name``."""
        self._client = client
        self._namespace = namespace
        self._name = name
        self._hostname = hostname
        self._last: CertificateSet | None = None
        """The certificates that the last call returned. A Secret that was deleted gets these certificates back, because
        running attempts trust their CA. A Secret that somebody emptied gets a new CA."""
        self._last_uid = ""
        """`metadata.uid` of the Secret at the last call. Another uid means that the Secret was deleted and created
        again, for example by Helm or Argo CD, which create it empty."""

    async def current(self, now: datetime) -> ServingCertificate:
        """Return the certificate to use at ``now``. Where due, make or renew it first and store it in the Secret."""
        return (await self.ensure(now)).serving

    async def ensure(self, now: datetime) -> CertificateSet:
        """Make or renew the certificates where due, store them in the Secret, and return the Secret's certificates.

        Where somebody else has written the Secret meanwhile, the Secret is read again and its certificates are used.
        Raises ApiError (409) where the Secret can't be written at the second try either. There is no third try, because
        a webhook may answer 409 for ever.
        """
        try:
            return await self._ensure(now)
        except ApiError as error:
            if not (error.is_name_taken or error.is_conflict):
                raise
        return await self._ensure(now)

    async def _ensure(self, now: datetime) -> CertificateSet:
        """Try once to do what `ensure` does. Raises ApiError (409) where somebody else has written the Secret
        meanwhile."""
        secret = await self._client.get_secret(self._namespace, self._name)
        stored = from_secret_data(secret.get("data") or {}) if secret is not None else None
        was_deleted = secret is None or secret["metadata"]["uid"] != self._last_uid
        new = renew_if_due(stored or (self._last if was_deleted else None), hostname=self._hostname, now=now)
        if secret is None:
            secret = await self._client.create_secret(self._new_secret(new))
        elif new != stored:
            await self._client.update_secret({**secret, "data": (secret.get("data") or {}) | new.to_data()})
        self._last, self._last_uid = new, secret["metadata"]["uid"]
        return new

    def _new_secret(self, content: CertificateSet) -> Manifest:
        """Return the manifest of the Secret to create, with ``content`` as its data.

        This Secret has the type of the Secret in the Helm chart, because the type of a Secret can't be changed later.
        """
        metadata = {"namespace": self._namespace, "name": self._name}
        kind = {"apiVersion": SECRETS.api_version, "kind": "Secret", "type": "Opaque"}
        return {**kind, "metadata": metadata, "data": content.to_data()}


class ExternalCertificates:
    """Reads a certificate that somebody else, such as cert-manager, maintains in a TLS Secret that also has ca.crt."""

    def __init__(self, client: KubeClient, *, namespace: str, name: str, hostname: str) -> None:
        """Read the certificate for ``hostname`` from the Secret ``namespace/name``; the Secret is never written."""
        self._client = client
        self._where = f"Secret {namespace}/{name}"
        self._namespace = namespace
        self._name = name
        self._hostname = hostname

    async def current(self, now: datetime) -> ServingCertificate:
        """Return the certificate in the Secret.

        Raises CertificateError where the Secret is missing or incomplete, where one of its certificates can't be read,
        and where the server certificate has ended at ``now`` or is for another host name.
        """
        secret = await self._client.get_secret(self._namespace, self._name)
        data = (secret or {}).get("data") or {}
        missing = [name for name in _EXTERNAL_KEYS if not data.get(name)]
        if missing:
            raise CertificateError(f"{self._where} must exist and hold {', '.join(missing)}")
        try:
            serving = ServingCertificate(*(base64.b64decode(data[name]).decode("ascii") for name in _EXTERNAL_KEYS))
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


def _belongs(key: str, certificate: str) -> bool:
    """Return whether the private key ``key`` belongs to ``certificate``; both are PEM texts."""
    public = serialization.load_pem_private_key(key.encode(), password=None).public_key()
    return public == x509.load_pem_x509_certificate(certificate.encode()).public_key()


def _not_after(pem: str) -> datetime:
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc


def _hostnames(pem: str) -> list[str]:
    extension = x509.load_pem_x509_certificate(pem.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return [*extension.value.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def _general_name(hostname: str) -> x509.GeneralName:
    """Return ``hostname`` as a certificate's name: an IP address where the operator runs outside a cluster, else a DNS
    name."""
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
