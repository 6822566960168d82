"""Loads the report server's certificate into its TLS context, and reloads a renewed certificate while it serves.

`application.py` loads the certificate before the server starts, runs `reload_forever`, and passes `ca_bundle` to the
reconciler, which puts the CA into the ConfigMap of every attempt.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from typing import Final, Protocol

from finetune_operator.kube.client import REQUEST_ERRORS
from finetune_operator.process.metrics import Metrics
from finetune_operator.reports.certificates import CertificateError, ServingCertificate, load_certificate

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 5.0


class CertificateSource(Protocol):
    """The place that certificates come from: `SelfSignedCertificates` or `ExternalCertificates`."""

    async def current(self, now: datetime) -> ServingCertificate:
        """Return the certificate that is valid at ``now``; raises CertificateError where there is none."""


class CertificateReloader:
    """Keeps a TLS context up to date with the certificates of a source."""

    def __init__(self, source: CertificateSource, context: ssl.SSLContext, metrics: Metrics) -> None:
        """Load certificates of ``source`` into ``context``; nothing is loaded yet."""
        self._source = source
        self._context = context
        self._metrics = metrics
        self._current: ServingCertificate | None = None

    def ca_bundle(self) -> str:
        """Return the PEM text of the CA that the training pods must trust."""
        assert self._current is not None, "load() comes first"
        return self._current.ca_certificate

    async def load(self) -> None:
        """Read the certificate from the source; present a changed certificate to all new connections."""
        certificate = await self._source.current(datetime.now(UTC))
        if certificate != self._current:
            load_certificate(self._context, certificate)
            self._current = certificate
            self._metrics.certificate_expiry.set(certificate.expires.timestamp())
            logger.info("certificate in use until %s", certificate.expires.isoformat())

    async def reload_forever(self, seconds: float) -> None:
        """Load the certificate again every ``seconds``. Never returns.

        A failure is retried after 5 s. Retries have 30 days, because a certificate is renewed so long before its end.
        """
        while True:
            await asyncio.sleep(seconds)
            await self.load_with_retries()

    async def load_with_retries(self) -> None:
        """Load the certificate, and retry every 5 s while the API server is away or the Secret does not exist yet."""
        while True:
            try:
                return await self.load()
            except (*REQUEST_ERRORS, CertificateError, ssl.SSLError) as error:
                logger.warning("the certificates could not be loaded: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
