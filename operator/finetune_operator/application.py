"""Puts the parts together and runs them: client, certificates, servers, workers, resync, watches."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Coroutine
from datetime import UTC, datetime

import aiohttp

from finetune_operator.certificates import Certificates, CertificateStore, load_into, server_context
from finetune_operator.cluster import ApiError, Cluster, load_configuration
from finetune_operator.controller import Controller
from finetune_operator.health import Activity, HealthServer
from finetune_operator.keyqueue import KeyQueue
from finetune_operator.memory import Memory
from finetune_operator.metrics import Metrics
from finetune_operator.pytorchjob import PyTorchJobBackend
from finetune_operator.reconcile import Reconciler
from finetune_operator.report_server import ReportServer
from finetune_operator.runtime import watch
from finetune_operator.settings import Settings
from finetune_operator.tokens import TokenReviewer

logger = logging.getLogger(__name__)

CERTIFICATE_LOOK_SECONDS = 3600.0
CERTIFICATE_RETRY_SECONDS = 5.0


class ServingCertificates:
    """The certificates in use, renewed while the server runs."""

    def __init__(self, store: CertificateStore, context: ssl.SSLContext, metrics: Metrics) -> None:
        """Load what ``store`` holds into ``context``."""
        self._store = store
        self._context = context
        self._metrics = metrics
        self._current: Certificates | None = None

    def ca_bundle(self) -> str:
        """Return the CA that goes into the attempts' ConfigMaps."""
        assert self._current is not None, "load() comes first"
        return self._current.ca_certificate

    async def load(self) -> None:
        """Read the Secret, renew what ends soon, and present the result from now on."""
        certificates = await self._store.ensure(datetime.now(UTC))
        if certificates != self._current:
            load_into(self._context, certificates)
            self._current = certificates
            self._metrics.certificate_expiry.set(certificates.expires.timestamp())
            logger.info("certificate in use until %s", certificates.expires.isoformat())

    async def keep(self) -> None:
        """Look every hour, for ever; a failure leaves 30 days to try again."""
        while True:
            await asyncio.sleep(CERTIFICATE_LOOK_SECONDS)
            await self.load_patiently()

    async def load_patiently(self) -> None:
        """Load, and try again every few seconds while the API server does not answer or refuses."""
        while True:
            try:
                return await self.load()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the certificates could not be loaded: %s", error)
            await asyncio.sleep(CERTIFICATE_RETRY_SECONDS)


async def run(settings: Settings) -> None:
    """Run the operator until SIGTERM; raises what ended it otherwise, and the process ends with it."""
    configuration = await load_configuration(settings)
    cluster = Cluster(configuration)
    metrics, queue, memory, activity = Metrics(), KeyQueue(), Memory(), Activity()
    store = CertificateStore(
        cluster, namespace=settings.namespace, name=settings.certificate_secret, hostname=settings.report_hostname
    )
    context = server_context()
    certificates = ServingCertificates(store, context, metrics)
    health = HealthServer(activity=activity, queue=queue, metrics=metrics, resync_seconds=settings.resync_seconds)
    reports = ReportServer(memory=memory, queue=queue, reviewer=TokenReviewer(cluster), metrics=metrics)
    reconciler = Reconciler(
        cluster=cluster,
        backend=PyTorchJobBackend(cluster),
        memory=memory,
        metrics=metrics,
        trainer_image=settings.trainer_image,
        report_base_url=settings.report_base_url,
        ca_bundle=certificates.ca_bundle,
        instance=socket.gethostname(),
    )
    controller = Controller(
        queue=queue, reconciler=reconciler, cluster=cluster, memory=memory, activity=activity, metrics=metrics
    )
    try:
        await health.start(settings.health_port)
        await certificates.load_patiently()
        await reports.start(settings.report_port, context)
        loops = [
            certificates.keep(),
            controller.resync(settings.watch_namespaces, settings.resync_seconds),
            *(controller.work() for _ in range(settings.workers)),
        ]
        await _until_first_ends(
            watch(queue=queue, activity=activity, configuration=configuration, namespaces=settings.watch_namespaces),
            loops,
        )
    finally:
        await reports.stop()
        await health.stop()
        await cluster.close()


async def _until_first_ends(watching: Coroutine[None, None, None], loops: list[Coroutine[None, None, None]]) -> None:
    """Run all; when the watches end (SIGTERM) or anything fails, end the others and raise the failure."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (watching, *loops)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        # What the first failure was is being raised; what the others say while they are cancelled is its echo.
        await asyncio.gather(*tasks, return_exceptions=True)
