"""The keys and certificates of one cluster. Each cluster has a certificate authority of its own, which signs all of its
certificates."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Time for which certificates are valid. It must be more than 90 days, because the training-operator replaces
# certificates that end within 90 days.
LIFETIME = datetime.timedelta(days=365)

# Name of the certificate authority. The training-operator replaces certificates of an authority with any other name.
AUTHORITY_NAME = "training-operator-ca"

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Pair:
    """The paths of a certificate and of its private key."""

    certificate: Path
    key: Path


class Authority:
    """A new certificate authority. It signs certificates, and writes all certificates and keys into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The authority's key is an RSA key in PKCS#1 form, because the training-operator can read no other form.
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = _subject(AUTHORITY_NAME, ())
        builder = begin(self._name, self._name, self._key)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(key_usage(signs_certificates=True), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(AUTHORITY_NAME)]), critical=False)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.pair = self._write("ca", self._certificate, self._key)

    def issue(
        self,
        file: str,
        name: str,
        *,
        organizations: Sequence[str] = (),
        hosts: Sequence[str] = (),
        old_format: bool = False,
    ) -> Pair:
        """Make a key and a certificate for ``name``, valid for clients and servers. Write them as ``<file>.key`` and
        ``<file>.crt``.

        ``organizations`` are the groups to which the client belongs, for example ``"system:masters"``. ``hosts`` are
        the DNS names and IP addresses under which a server is reached. With ``old_format`` the key is an RSA key
        instead of an elliptic-curve key.
        """
        key: PrivateKey = (
            rsa.generate_private_key(65537, 2048) if old_format else ec.generate_private_key(ec.SECP256R1())
        )
        builder = begin(_subject(name, organizations), self._name, key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(key_usage(signs_certificates=False), critical=True)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        return self._write(file, builder.sign(self._key, hashes.SHA256()), key)

    def service_account_keys(self) -> Pair:
        """Make and write the key pair for service-account tokens: the private key signs tokens, and the public key
        verifies them. The field ``certificate`` of the returned pair is the path of the public key."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pair = Pair(self._folder / "service-account.pub", self._folder / "service-account.key")
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        pair.certificate.write_bytes(public)
        _write_key(pair.key, key)
        return pair

    def _write(self, file: str, certificate: x509.Certificate, key: PrivateKey) -> Pair:
        pair = Pair(self._folder / f"{file}.crt", self._folder / f"{file}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(pair.key, key)
        return pair


def _write_key(path: Path, key: PrivateKey) -> None:
    path.touch(mode=0o600)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _subject(name: str, organizations: Sequence[str]) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization) for organization in organizations]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def begin(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, lifetime: datetime.timedelta = LIFETIME
) -> x509.CertificateBuilder:
    """Return the builder of a certificate. The caller adds extensions and signs the certificate. The certificate is
    valid from five minutes ago until ``lifetime`` from now."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + lifetime)
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the key usage extension of a certificate. If ``signs_certificates`` is True, the certificate is that of a
    certificate authority. Otherwise it is that of a client or a server."""
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
