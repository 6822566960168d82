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

from finetune_operator.kube.api_errors import REQUEST_ERRORS
from finetune_operator.process.metrics import Metrics
from finetune_operator.reports.certificates import CertificateError, ServingCertificate, load_certificate

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 5.0


class CertificateSource(Protocol):
    """Where certificates come from. Implemented by `SelfSignedCertificates` and `ExternalCertificates`."""

    async def current(self, now: datetime) -> ServingCertificate:
        """Return a certificate that is valid at ``now``; raise CertificateError where there is none."""


class CertificateReloader:
    """Loads the certificate of a source into a TLS context, again and again, so that a renewed certificate is used."""

    def __init__(self, source: CertificateSource, context: ssl.SSLContext, metrics: Metrics) -> None:
        """Prepare to load certificates of ``source`` into ``context``. Nothing is loaded yet."""
        self._source = source
        self._context = context
        self._metrics = metrics
        self._current: ServingCertificate | None = None

    def ca_bundle(self) -> str:
        """Return the PEM text of the CA that the training pods must trust. A `load` must have succeeded before."""
        assert self._current is not None, "load() comes first"
        return self._current.ca_certificate

    async def load(self) -> None:
        """Read the certificate from the source. If it has changed, present it to all new connections."""
        certificate = await self._source.current(datetime.now(UTC))
        if certificate != self._current:
            load_certificate(self._context, certificate)
            self._current = certificate
            self._metrics.certificate_expiry.set(certificate.expires.timestamp())
            logger.info("certificate in use until %s", certificate.expires.isoformat())

    async def reload_forever(self, seconds: float) -> None:
        """Load the certificate again every ``seconds``. Never returns.

        A failure is retried every 5 s, and the old certificate serves meanwhile. If the operator can't renew its own
        certificate, the old certificate is still valid for up to 30 days, because the renewal begins 30 days before the
        certificate ends.
        """
        while True:
            await asyncio.sleep(seconds)
            await self.load_with_retries()

    async def load_with_retries(self) -> None:
        """Load the certificate, and retry every 5 s until that succeeds.

        The load fails, for example, while the API server is away or the Secret does not exist yet.
        """
        while True:
            try:
                return await self.load()
            except (*REQUEST_ERRORS, CertificateError, ssl.SSLError) as error:
                logger.warning("the certificates could not be loaded: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
