"""The certificate that the report server presents, and the CA that attempts get to trust it: loaded before the first
report, looked at again at every resync, exchanged while the server runs. Called by `application`."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from typing import Final, Protocol

import aiohttp

from finetune_operator.kube.client import ApiError
from finetune_operator.process.metrics import Metrics
from finetune_operator.reports.certificates import CertificateError, Serving, load_into

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 5.0


class CertificateSource(Protocol):
    """Where certificates come from."""

    async def current(self, now: datetime) -> Serving:
        """Return certificates that are good at ``now``; raises CertificateError where there are none."""


class CertificateReloader:
    """The certificates in use, renewed while the server runs."""

    def __init__(self, source: CertificateSource, context: ssl.SSLContext, metrics: Metrics) -> None:
        """Load what ``source`` has into ``context``."""
        self._source = source
        self._context = context
        self._metrics = metrics
        self._current: Serving | None = None

    def ca_bundle(self) -> str:
        """Return the CA that goes into the attempts' ConfigMaps."""
        assert self._current is not None, "load() comes first"
        return self._current.ca_certificate

    async def load(self) -> None:
        """Read the certificates, and present them from now on."""
        certificates = await self._source.current(datetime.now(UTC))
        if certificates != self._current:
            load_into(self._context, certificates)
            self._current = certificates
            self._metrics.certificate_expiry.set(certificates.expires.timestamp())
            logger.info("certificate in use until %s", certificates.expires.isoformat())

    async def keep(self, seconds: float) -> None:
        """Look every ``seconds``, for ever; a failure leaves days to try again."""
        while True:
            await asyncio.sleep(seconds)
            await self.load_with_retries()

    async def load_with_retries(self) -> None:
        """Load, and try again every few seconds: the API server may be away, the Secret may come later."""
        while True:
            try:
                return await self.load()
            except (ApiError, CertificateError, aiohttp.ClientError, ssl.SSLError, TimeoutError) as error:
                logger.warning("the certificates could not be loaded: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
