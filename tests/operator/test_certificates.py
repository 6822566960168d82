"""Tests of `reports/certificates.py`: certificates work in a TLS handshake, are renewed only when due, and are kept in
a Secret."""

from __future__ import annotations

import base64
import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import ClientSession, ClientSSLError, web
from aiohttp.test_utils import TestServer

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.reports.certificates import (
    LEAF_LIFETIME,
    CertificateError,
    CertificateSet,
    ExternalCertificates,
    SelfSignedCertificates,
    from_secret_data,
    load_certificate,
    renew_if_due,
    server_context,
)

NOW = datetime(2026, 11, 24, tzinfo=UTC)
HOST = "localhost"


def made(now: datetime = NOW, hostname: str = HOST) -> CertificateSet:
    return renew_if_due(None, hostname=hostname, now=now)


def test_the_leaf_is_renewed_a_month_before_its_end_by_the_same_ca() -> None:
    first = made()
    assert renew_if_due(first, hostname=HOST, now=NOW + timedelta(days=59)) == first
    second = renew_if_due(first, hostname=HOST, now=NOW + timedelta(days=61))
    assert second.ca_certificate == first.ca_certificate
    assert second.certificate != first.certificate
    assert second.serving.expires == NOW + timedelta(days=151)


def test_another_host_name_needs_another_leaf() -> None:
    first = made()
    assert renew_if_due(first, hostname="other.ns.svc", now=NOW).certificate != first.certificate
    address = made(hostname="10.244.0.1")
    assert renew_if_due(address, hostname="10.244.0.1", now=NOW) == address


def test_the_ca_is_replaced_before_a_leaf_would_outlive_it() -> None:
    first = made()
    late = renew_if_due(first, hostname=HOST, now=NOW + timedelta(days=3600))
    assert late.ca_certificate != first.ca_certificate


def test_data_survives_the_secret_and_an_empty_secret_is_none() -> None:
    first = made()
    assert from_secret_data(first.to_data()) == first
    assert from_secret_data({}) is None


async def _hello(_request: web.Request) -> web.Response:
    return web.Response(text="hello")


async def test_a_client_with_the_ca_bundle_trusts_the_server_and_others_do_not() -> None:
    certificates = made(now=datetime.now(UTC))
    context = server_context()
    load_certificate(context, certificates.serving)
    application = web.Application()
    application.router.add_get("/", _hello)
    trusting = ssl.create_default_context(cadata=certificates.ca_certificate)
    async with TestServer(application, host=HOST) as server:
        assert server.runner is not None
        site = web.TCPSite(server.runner, HOST, 0, ssl_context=context)
        await site.start()
        address = f"https://{HOST}:{server.runner.addresses[-1][1]}/"
        async with ClientSession() as session:
            async with session.get(address, ssl=trusting) as response:
                assert response.status == 200
            with pytest.raises(ClientSSLError):
                await session.get(address)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Do a TLS handshake between ``client`` and ``server`` in memory; raises SSLError where the handshake fails."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not ends, "the handshake has no end"


def test_a_pair_that_does_not_fit_is_refused_and_the_server_goes_on_with_the_old_one() -> None:
    first, second = (made(now=datetime.now(UTC)) for _ in range(2))
    context = server_context()
    load_certificate(context, first.serving)
    with pytest.raises(CertificateError, match=r"tls\.key must be the private key of tls\.crt"):
        load_certificate(context, replace(second.serving, key=first.key))
    handshake(context, ssl.create_default_context(cadata=first.ca_certificate))
    load_certificate(context, second.serving)
    handshake(context, ssl.create_default_context(cadata=second.ca_certificate))


def with_uid(uid: str, data: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"uid": uid}, "data": data}


class OneSecret:
    """A fake client with one Secret; the first ``lost_updates`` updates fail because another replica wrote first."""

    def __init__(self, data: dict[str, str] | None, *, lost_updates: int = 0) -> None:
        self.secret: dict[str, Any] | None = None if data is None else with_uid("uid-0", data)
        self.lost_updates = lost_updates
        self.updates = 0
        self.refusal: ApiError | None = None
        """The error with which a creation fails; None lets it succeed."""

    async def get_secret(self, _namespace: str, _name: str) -> dict[str, Any] | None:
        return self.secret

    async def create_secret(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.secret = manifest | {"metadata": manifest["metadata"] | {"uid": "uid-new"}}
        return self.secret

    async def update_secret(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.updates += 1
        if self.updates <= self.lost_updates:
            self.secret = with_uid("uid-0", made().to_data())
            raise ApiError(409, "Conflict", "changed")
        self.secret = manifest
        return manifest


def store(cluster: OneSecret) -> SelfSignedCertificates:
    return SelfSignedCertificates(cluster, namespace="n", name="s", hostname=HOST)  # type: ignore[arg-type]


async def test_an_empty_secret_is_filled_once() -> None:
    cluster = OneSecret({})
    first = await store(cluster).ensure(NOW)
    assert await store(cluster).ensure(NOW) == first
    assert cluster.updates == 1


async def test_the_replica_that_was_faster_wins() -> None:
    cluster = OneSecret({}, lost_updates=1)
    certificates = await store(cluster).ensure(NOW)
    assert cluster.secret is not None
    assert certificates == from_secret_data(cluster.secret["data"])
    assert cluster.updates == 1


async def test_the_replica_that_created_the_secret_first_wins() -> None:
    class CreatedMeanwhile(OneSecret):
        async def create_secret(self, _manifest: dict[str, Any]) -> dict[str, Any]:
            self.secret = with_uid("uid-0", made().to_data())
            raise ApiError(409, "AlreadyExists", "secrets s already exists")

    cluster = CreatedMeanwhile(None)
    certificates = await store(cluster).ensure(NOW)
    assert cluster.secret is not None
    assert certificates == from_secret_data(cluster.secret["data"])


async def test_a_missing_secret_is_created() -> None:
    cluster = OneSecret(None)
    certificates = await store(cluster).ensure(NOW)
    assert cluster.secret is not None
    assert cluster.secret["metadata"] == {"namespace": "n", "name": "s", "uid": "uid-new"}
    assert from_secret_data(cluster.secret["data"]) == certificates


async def test_a_deleted_secret_gets_the_certificates_back_that_running_attempts_trust() -> None:
    cluster = OneSecret({})
    certificates = store(cluster)
    first = await certificates.ensure(NOW)
    cluster.secret = None
    assert await certificates.ensure(NOW) == first
    assert cluster.secret is not None
    assert from_secret_data(cluster.secret["data"]) == first
    cluster.secret = with_uid("made empty by Helm or Argo CD", {})
    assert await certificates.ensure(NOW) == first
    assert from_secret_data(cluster.secret["data"]) == first


async def test_a_secret_that_a_person_emptied_gets_a_new_authority() -> None:
    cluster = OneSecret({})
    certificates = store(cluster)
    first = await certificates.ensure(NOW)
    cluster.secret = with_uid("uid-0", {})
    assert (await certificates.ensure(NOW)).ca_certificate != first.ca_certificate


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "tls.crt", "tls.key"])
@pytest.mark.parametrize(
    "value",
    [
        b"\xff\xfe",
        b"no PEM",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        made().ca_key.encode(),
        made().ca_certificate.encode(),
        made().key.encode(),
        made().certificate.encode(),
    ],
    ids=["bytes", "text", "short", "another CA's key", "another CA", "another key", "another certificate"],
)
async def test_a_secret_with_a_value_that_does_not_fit_gets_new_certificates(name: str, value: bytes) -> None:
    old = made()
    cluster = OneSecret(old.to_data() | {name: base64.b64encode(value).decode()})
    new = await store(cluster).ensure(NOW)
    assert new.ca_certificate != old.ca_certificate
    assert cluster.secret is not None
    assert from_secret_data(cluster.secret["data"]) == new
    load_certificate(server_context(), new.serving)


async def test_a_quota_that_refuses_the_secret_is_told() -> None:
    cluster = OneSecret(None)
    cluster.refusal = ApiError(409, "Conflict", "exceeded quota")
    with pytest.raises(ApiError, match="exceeded quota"):
        await store(cluster).ensure(NOW)


@pytest.mark.parametrize("reason", ["AlreadyExists", "Conflict", ""])
@pytest.mark.parametrize("stored", [None, {}], ids=["no Secret", "an empty Secret"])
async def test_a_webhook_that_answers_409_for_ever_is_told_after_two_tries(
    stored: dict[str, str] | None, reason: str
) -> None:
    class Refusing(OneSecret):
        async def create_secret(self, _manifest: dict[str, Any]) -> dict[str, Any]:
            self.updates += 1
            raise ApiError(409, reason, "a webhook says no")

        async def update_secret(self, manifest: dict[str, Any]) -> dict[str, Any]:
            return await self.create_secret(manifest)

    cluster = Refusing(stored)
    with pytest.raises(ApiError, match="a webhook says no"):
        await store(cluster).ensure(NOW)
    assert cluster.updates == 2


def external(data: dict[str, str] | None) -> ExternalCertificates:
    cluster = OneSecret(data)
    return ExternalCertificates(cluster, namespace="n", name="s", hostname=HOST)  # type: ignore[arg-type]


async def test_certificates_that_somebody_else_keeps_are_used_as_they_are() -> None:
    kept = made()
    data = {name: value for name, value in kept.to_data().items() if name != "ca.key"}
    assert await external(data).current(NOW) == kept.serving


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "n/s must exist and hold ca.crt, tls.crt, tls.key"),
        ({"tls.crt": "eA==", "tls.key": "eA=="}, "must exist and hold ca.crt"),
        ({"tls.crt": "eA==", "tls.key": "eA==", "ca.crt": "eA=="}, "must be PEM certificates"),
        (made().to_data() | {"ca.crt": "/wA="}, "must be PEM certificates"),
        (made().to_data() | {"ca.crt": "eA=="}, "ca.crt and tls.crt must be PEM certificates"),
        (renew_if_due(None, hostname="other", now=NOW).to_data(), f"must name {HOST}"),
        (renew_if_due(None, hostname=HOST, now=NOW - LEAF_LIFETIME - timedelta(days=1)).to_data(), "ended at"),
    ],
    ids=["no Secret", "no CA", "no certificate", "no text", "no CA certificate", "another host", "ended"],
)
async def test_a_foreign_secret_that_can_not_serve_is_refused_with_a_sentence(
    data: dict[str, str] | None, sentence: str
) -> None:
    with pytest.raises(CertificateError, match=sentence):
        await external(data).current(NOW)
