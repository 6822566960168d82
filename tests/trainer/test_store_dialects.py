"""Variants of S3, each against a MinIO server that is configured for it: TLS with a private CA, the bucket name in the
host name, regions, session tokens, web identity, and encryption at rest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from minio.credentials import AssumeRoleProvider, WebIdentityProvider

from finetune_cli.bucket.object_store import AccessKey
from finetune_cli.bucket.object_store import ObjectStoreReader as CliStore
from finetune_core.api import FineTuneJob
from finetune_core.api.storage import EncryptionSpec, StorageSpec
from finetune_core.contract.run_file import StorageConfig
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_core.resolve import resolve
from finetune_core.validation.validate_job import validate_job
from finetune_operator.objects.pod_template import AttemptSpec, pod_template
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_pod
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.settings import Paths
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.credentials import NoCredentials, PodIdentity, identity_http_pool
from finetune_trainer.storage.lineage import RunRecord, claim_run_number
from finetune_trainer.storage.root import RunRoot, open_root
from tests.cluster.waiting import wait_for
from tests.core.jobs import quickstart
from tests.operator.builders import job_manifest
from tests.trainer.objectstore import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    ObjectStore,
    running_store,
    write_credentials,
)
from tests.trainer.storeproxy import Fault, proxy_before

KMS_KEY = "finetune-key"
CLIENT_ID = "finetune"
CLUSTER_AUDIENCE = "minio"
CLUSTER_ROLE = "arn:minio:iam:::role/" + base64.urlsafe_b64encode(
    hashlib.sha1(CLUSTER_AUDIENCE.encode(), usedforsecurity=False).digest()
).decode().rstrip("=")
"""The role that MinIO makes for an OpenID provider with a role policy. The name of the role is the SHA-1 of the client
id in base64."""


@dataclass(frozen=True)
class Issuer:
    """A small OpenID Connect issuer of tokens. A Kubernetes cluster also is an issuer: it issues the tokens of its
    service accounts."""

    url: str
    key: rsa.RSAPrivateKey

    def token(self, **claims: Any) -> str:
        """Return a signed token that is valid for an hour. ``claims`` are added to the usual claims or replace them."""
        now = int(time.time())
        payload = {"iss": self.url, "aud": CLIENT_ID, "sub": "pod", "iat": now, "exp": now + 3600, **claims}
        parts = [_encoded(json.dumps(part).encode()) for part in ({"alg": "RS256", "kid": "1", "typ": "JWT"}, payload)]
        signed = ".".join(parts)
        return f"{signed}.{_encoded(self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.public_key().public_numbers()
    modulus = numbers.n.to_bytes(256, "big")

    class Documents(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = f"http://127.0.0.1:{server.server_port}"
            documents = {
                "/.well-known/openid-configuration": {
                    "issuer": url,
                    "jwks_uri": f"{url}/keys",
                    "authorization_endpoint": f"{url}/authorize",
                    "token_endpoint": f"{url}/token",
                    "response_types_supported": ["id_token"],
                    "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["RS256"],
                },
                "/keys": {
                    "keys": [
                        {
                            "kty": "RSA",
                            "alg": "RS256",
                            "use": "sig",
                            "kid": "1",
                            "n": _encoded(modulus),
                            "e": _encoded(numbers.e.to_bytes(3, "big")),
                        }
                    ]
                },
            }
            body = json.dumps(documents.get(self.path, {})).encode()
            self.send_response(200 if self.path in documents else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Suppress the server's log lines."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Documents)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Issuer(f"http://127.0.0.1:{server.server_port}", key)
    server.shutdown()
    server.server_close()


def write_certificates(folder: Path) -> Path:
    """Write to ``folder`` a CA and a certificate for 127.0.0.1, localhost, minio.test and the subdomains of minio.test.

    Each subdomain is named after a bucket.
    """
    folder.mkdir()
    now = datetime.now(UTC)
    authority_key, key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])

    def builder(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )

    authority = (
        builder(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = [x509.DNSName(name) for name in ("localhost", "minio.test", "*.minio.test")]
    server = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "minio.test")]), key.public_key())
        .add_extension(x509.SubjectAlternativeName([*names, x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (folder / "public.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / "private.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return folder


@dataclass(frozen=True)
class Strict:
    """A running MinIO server with TLS, a KMS key, OpenID and bucket names in the host name."""

    store: ObjectStore
    ca: Path

    @property
    def port(self) -> int:
        return int(self.store.endpoint.rpartition(":")[2])

    def open(self, credentials: Path | None = None, **options: Any) -> Store:
        options = {"ca_file": self.ca, "budget_seconds": 0, **options}
        endpoint = options.pop("endpoint", self.store.endpoint)
        return Store(endpoint, options.pop("region", "us-east-1"), credentials or self.store.credentials, **options)


@pytest.fixture(scope="module")
def strict(issuer: Issuer, minio: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Strict]:
    folder = tmp_path_factory.mktemp("strict")
    certificates = write_certificates(folder / "certificates")
    variables = {
        "MINIO_DOMAIN": "minio.test",
        "MINIO_KMS_SECRET_KEY": f"{KMS_KEY}:{base64.b64encode(b'k' * 32).decode()}",
        "MINIO_IDENTITY_OPENID_CONFIG_URL": f"{issuer.url}/.well-known/openid-configuration",
        "MINIO_IDENTITY_OPENID_CLIENT_ID": CLIENT_ID,
        "MINIO_IDENTITY_OPENID_CLAIM_NAME": "policy",
        # The token of a Kubernetes service account has no claim that names a policy. So MinIO gives all these tokens
        # one role.
        "MINIO_IDENTITY_OPENID_CONFIG_URL_CLUSTER": f"{issuer.url}/.well-known/openid-configuration",
        "MINIO_IDENTITY_OPENID_CLIENT_ID_CLUSTER": CLUSTER_AUDIENCE,
        "MINIO_IDENTITY_OPENID_ROLE_POLICY_CLUSTER": "readwrite",
    }
    with running_store(minio, folder, variables=variables, certificates=certificates) as store:
        found = Strict(store, certificates / "ca.crt")
        wait_for("MinIO to accept tokens of the issuer", lambda: accepts_tokens(found, issuer), 60)
        yield found


def accepts_tokens(strict: Strict, issuer: Issuer) -> bool:
    """Return whether MinIO has read the issuer's keys. MinIO reads them in the background after its start."""
    token = {"access_token": issuer.token(policy="readwrite"), "expires_in": 3600}
    provider = WebIdentityProvider(
        jwt_provider_func=lambda: token, sts_endpoint=strict.store.endpoint, http_client=strict.open()._http
    )
    try:
        return bool(provider.retrieve().access_key)
    except ValueError:
        return False


@pytest.fixture
def minio_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve minio.test and all its subdomains to this machine, as DNS records would."""
    resolve = socket.getaddrinfo

    def local(host: Any, *rest: Any, **options: Any) -> Any:
        name = "127.0.0.1" if isinstance(host, str) and host.endswith("minio.test") else host
        return resolve(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)


def works(store: Store, key: str) -> None:
    """Use ``store`` for a folder named ``key`` as the trainer does for the folder of a run, and check the answers.
    No multipart upload and no HEAD request is sent."""
    root = RunRoot(store, parse_uri(f"s3://{BUCKET}/dialects/{key}"))
    assert claim_run_number(root, 1, RunRecord(attempt=1, pod_uid="pod"))
    assert not root.create("runs/000001.json", b"another writer")
    root.write("object", b"data")
    assert root.read("object") == b"data"
    assert [entry.key for entry in root.list_objects("")] == ["object", "runs/000001.json"]
    assert root.abort_multipart_uploads() == []
    assert store.read_range(BUCKET, root.location.key("object"), 1, 2) == b"at"
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder, "sent"), Path(folder, "received")
        sent.write_bytes(b"file")
        assert root.upload("object", sent) == root.download("object", received)
        assert received.read_bytes() == b"file"
    root.delete(["object"])
    assert root.read("object") is None


def cli_store(strict: Strict, certificates: str | None, **storage: Any) -> CliStore:
    spec = {"uri": f"s3://{BUCKET}/x", "endpoint": strict.store.endpoint, **storage}
    return CliStore(StorageSpec.model_validate(spec), AccessKey(ACCESS_KEY, SECRET_KEY), None, certificates)


def test_an_authority_of_ones_own_is_trusted_where_it_is_named_and_only_there(strict: Strict) -> None:
    works(strict.open(), "authority")
    with pytest.raises(OutsideFailure, match=r"can't be reached \(.*certificate verify failed"):
        strict.open(ca_file=None).read(BUCKET, "key")
    assert cli_store(strict, strict.ca.read_text()).entries(BUCKET, "dialects/authority/")
    with pytest.raises(UserError, match="certificate verify failed"):
        cli_store(strict, None).entries(BUCKET, "dialects/")
    with pytest.raises(UserError, match=r"storage\.caConfigMapRef: must hold certificates in PEM"):
        cli_store(strict, "no certificate")


@pytest.mark.usefixtures("minio_names")
def test_the_bucket_in_the_host_name_and_in_the_path(strict: Strict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def heard(host: Any, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", heard)
    endpoint = f"https://minio.test:{strict.port}"
    works(strict.open(endpoint=endpoint, addressing="VirtualHosted"), "virtual")
    assert set(asked) == {f"{BUCKET}.minio.test"}
    asked.clear()
    works(strict.open(endpoint=endpoint, addressing="Path"), "path")
    assert set(asked) == {"minio.test"}
    asked.clear()
    cli = cli_store(strict, strict.ca.read_text(), endpoint=endpoint, addressing="VirtualHosted")
    assert len(cli.entries(BUCKET, "dialects/virtual/")) == 1
    assert set(asked) == {f"{BUCKET}.minio.test"}


def test_requests_are_signed_for_the_region(minio: Path, tmp_path: Path) -> None:
    region = "eu-central-7"
    with (
        running_store(minio, tmp_path, variables={"MINIO_REGION_NAME": region}, region=region) as store,
        proxy_before(store.endpoint) as proxy,
    ):
        works(Store(proxy.endpoint, region, store.credentials, budget_seconds=0), "region")
        signed = [request.fields["authorization"] for request in proxy.requests]
        assert signed
        assert all(f"/{region}/s3/aws4_request" in authorization for authorization in signed)
        cli = CliStore(
            StorageSpec.model_validate({"uri": "s3://finetune/x", "endpoint": proxy.endpoint, "region": region}),
            AccessKey(ACCESS_KEY, SECRET_KEY),
        )
        assert cli.entries(BUCKET, "dialects/region/")
        assert f"/{region}/s3/aws4_request" in proxy.requests[-1].fields["authorization"]


def test_session_tokens_are_sent_and_an_expired_one_is_named(strict: Strict, tmp_path: Path) -> None:
    strict.store.client.list_buckets()
    provider = AssumeRoleProvider(
        sts_endpoint=strict.store.endpoint,
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        duration_seconds=900,
        http_client=strict.open()._http,
    )
    session = provider.retrieve()
    assert session.session_token
    keys = tmp_path / "keys"
    write_credentials(keys, session.access_key, session.secret_key)
    with pytest.raises(OutsideFailure, match=r"credentialsSecretRef: .* refused the credentials"):
        strict.open(keys).read(BUCKET, "key")
    (keys / "AWS_SESSION_TOKEN").write_text(f"{session.session_token}\n")
    works(strict.open(keys), "session")


def test_the_pods_own_identity_gives_the_key(
    strict: Strict, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment names a token file and the STS endpoint, as AWS's webhook for IAM roles (IRSA) sets them."""
    token = tmp_path / "token"
    token.write_text(issuer.token(policy="readwrite"))
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", strict.store.endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    store = Store(strict.store.endpoint, "us-east-1", None, ca_file=strict.ca, budget_seconds=0)
    works(store, "identity")
    token.write_text(issuer.token(policy="readwrite", exp=int(time.time()) - 60))
    late = Store(strict.store.endpoint, "us-east-1", None, ca_file=strict.ca, budget_seconds=0)
    with pytest.raises(OutsideFailure, match="the pod's own identity gives no access key") as refused:
        late.read(BUCKET, "key")
    assert token.read_text()[:40] not in str(refused.value), "a token is a secret"


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET_BEFORE, Fault.RESET_AFTER])
def test_a_short_fault_of_the_identity_service_costs_no_exchange(
    fault: Fault, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MinIO without an OpenID provider refuses the token, which shows that MinIO received the repeated request."""
    token = tmp_path / "token"
    token.write_text("secret? &secret#secret\tsecret\nsecret")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    with proxy_before(store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", proxy.endpoint)
        proxy.plan = lambda request: fault if request.index < 2 else None
        with pytest.raises(NoCredentials, match="400") as refused:
            PodIdentity("us-east-1", identity_http_pool(None)).retrieve()
        assert "secret" not in str(refused.value), "no part of a token, whatever its characters, stands in a message"
        assert [request.method for request in proxy.requests] == ["POST"] * 3


def test_a_job_with_an_identity_works_with_a_token_as_the_kubelet_projects_it(
    strict: Strict, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"audience": CLUSTER_AUDIENCE, "roleArn": CLUSTER_ROLE}
    storage = {"uri": f"s3://{BUCKET}/x", "endpoint": strict.store.endpoint, "identity": identity}
    manifest = job_manifest(storage=storage)
    assert validate_job(manifest).problems == []
    job = FineTuneJob.model_validate(manifest)
    attempt = AttemptSpec(number=1, name="attempt", image="trainer:1", report_base_url="https://operator:8443")
    preflight = PreflightSpec(number=1, name="preflight", image="trainer:1")
    for pod in (pod_template(job, attempt)["spec"], build_preflight_pod(job, preflight)["spec"]):
        (container,) = pod["containers"]
        variables = {item["name"]: item.get("value", "") for item in container["env"]}
        (volume,) = [item for item in pod["volumes"] if item["name"] == "storage-identity"]
        (mount,) = [item for item in container["volumeMounts"] if item["name"] == "storage-identity"]
        (source,) = volume["projected"]["sources"]
        projected = source["serviceAccountToken"]
        assert variables["AWS_WEB_IDENTITY_TOKEN_FILE"] == f"{mount['mountPath']}/{projected['path']}"
        token = tmp_path / "token"
        claims = {"aud": [projected["audience"]], "sub": "system:serviceaccount:team:default"}
        token.write_text(issuer.token(**claims))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, str(token) if name == "AWS_WEB_IDENTITY_TOKEN_FILE" else value)
        root = open_root(resolve(job, report=None), Paths(storage_ca_file=strict.ca))
        root.write("object", b"data")
        assert root.read("object") == b"data"
        root.delete(["object"])


@pytest.mark.parametrize(
    ("encryption", "header", "value"),
    [
        ({"sseS3": {}}, "x-amz-server-side-encryption", "AES256"),
        ({"kms": {"keyId": KMS_KEY}}, "x-amz-server-side-encryption-aws-kms-key-id", f"arn:aws:kms:{KMS_KEY}"),
    ],
    ids=["SSE-S3", "SSE-KMS"],
)
def test_everything_that_is_written_is_encrypted_as_asked(
    encryption: dict[str, Any], header: str, value: str, strict: Strict, tmp_path: Path
) -> None:
    store = strict.open(encryption=EncryptionSpec.model_validate(encryption))
    name = next(iter(encryption)).lower()
    works(store, name)
    file = tmp_path / "large"
    file.write_bytes(b"x" * 100_000)
    store.upload(BUCKET, f"dialects/{name}/uploaded", file)
    store.write(BUCKET, f"dialects/{name}/written", b"data")
    for key in ("runs/000001.json", "uploaded", "written"):
        stored = strict.store.client.stat_object(BUCKET, f"dialects/{name}/{key}")
        assert stored.metadata[header] == value, key
    assert "x-amz-server-side-encryption" not in plain_metadata(strict)


def plain_metadata(strict: Strict) -> dict[str, str]:
    """Write an object without encryption settings, and return its metadata."""
    strict.open().write(BUCKET, "dialects/plain", b"data")
    found: dict[str, str] = strict.store.client.stat_object(BUCKET, "dialects/plain").metadata
    return found


class ReadFields:
    """Takes the place of a StorageConfig, and records the names of the fields that are read."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.config, name)


SAVING = {"checkpoint_every_steps", "checkpoint_every_minutes", "keep_last", "keep_best", "artifact"}
"""Fields of StorageConfig that say when and what is saved, and what is kept. All other fields are about access to the
store."""


def test_the_launcher_workers_and_preflight_use_every_field_about_access_to_the_store() -> None:
    config = resolve(FineTuneJob.model_validate(quickstart()), report=None)
    fields = ReadFields(config.storage)
    open_root(config.model_copy(update={"storage": fields}), Paths())
    expected = set(StorageConfig.model_fields) - SAVING
    assert fields.names == expected, "open_root must give the new field to Store, or it belongs to SAVING"
