"""Puts the parts of the operator together and runs them: Lease, client, certificates, servers, workers and watches.

`__main__.py` calls `run` with the parsed settings.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine
from typing import Any

from finetune_operator.controller import Controller
from finetune_operator.kube.client import KubeClient, load_configuration
from finetune_operator.kube.fencing import lease_client
from finetune_operator.objects.backends.pytorchjob import PyTorchJobBackend
from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.process.health import HealthServer, WatchActivity
from finetune_operator.process.leader_election import LeaderElector, TimedLeaseLock
from finetune_operator.process.metrics import Metrics
from finetune_operator.process.settings import Settings
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.preflight_slots import PreflightSlots
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.reports.certificate_reloader import CertificateReloader, CertificateSource
from finetune_operator.reports.certificates import ExternalCertificates, SelfSignedCertificates, server_context
from finetune_operator.reports.endpoint_slice import EndpointSlicePublisher, ReportEndpoint
from finetune_operator.reports.server import ReportServer
from finetune_operator.reports.token_review import TokenReviewer
from finetune_operator.watches import watch

logger = logging.getLogger(__name__)


class Replica:
    """One process of the operator, which waits for the Lease and then leads until it is stopped."""

    def __init__(self, settings: Settings, configuration: Any) -> None:
        """Create all parts without sending a request. ``configuration`` is what `load_configuration` returned."""
        self._settings = settings
        self._configuration = configuration
        self._lease_client = lease_client(configuration)
        lease = TimedLeaseLock(
            settings.lease, settings.namespace, settings.lease_identity(), self._lease_client, time.monotonic
        )
        self._leadership = LeaderElector(lease)
        self._cluster = KubeClient(configuration, self._leadership.check)
        self._metrics, self._queue, self._memory, self._activity = Metrics(), WorkQueue(), Memory(), WatchActivity()
        self._context = server_context()
        self._certificates = CertificateReloader(
            _certificate_source(settings, self._cluster), self._context, self._metrics
        )
        self._health = HealthServer(
            activity=self._activity,
            queue=self._queue,
            metrics=self._metrics,
            leadership=self._leadership,
            resync_seconds=settings.resync_seconds,
        )
        self._reports = ReportServer(
            memory=self._memory,
            queue=self._queue,
            reviewer=TokenReviewer(self._cluster),
            metrics=self._metrics,
            jobs_are_listed=lambda: self._activity.ready,
            limits=ConnectionLimits(
                connections=settings.report_connections,
                per_address=settings.report_connections_per_address,
                # One request per second for each allowed connection is enough: a training job keeps one connection, and
                # sends a report every three seconds and a few more when something changes.
                requests_per_second=float(settings.report_connections_per_address),
            ),
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, and raise any exception that ends the operator earlier.

        The loss of the Lease raises no exception: it ends the process at once (`process/leader_election.py`).
        """
        stopping = _stop_signal()
        try:
            await self._health.start(self._settings.health_port)
            await _until_first_ends(self._wait_and_lead(), stopping.wait())
        finally:
            await self._reports.stop()
            await self._leadership.release()
            await self._health.stop()
            await self._cluster.close()
            await self._lease_client.close()

    async def _wait_and_lead(self) -> None:
        """Wait for the Lease, then lead for as long as the Lease is renewed."""
        await self._leadership.acquire(self._activity.lease_read)
        self._activity.started_leading()
        await _until_first_ends(self._lead(), self._leadership.renew_forever())

    async def _lead(self) -> None:
        """Do what only the leader does: receive reports, watch objects, and reconcile jobs.

        Returns or raises when the first of these parts ends or fails.
        """
        settings = self._settings
        await self._certificates.load_with_retries()
        await self._reports.start(settings.report_port, settings.pod_ip, self._context)
        controller = self._controller()
        await _until_first_ends(
            watch(
                queue=self._queue,
                memory=self._memory,
                activity=self._activity,
                configuration=self._configuration,
                namespaces=settings.watch_namespaces,
            ),
            self._certificates.reload_forever(settings.resync_seconds),
            *self._announcements(),
            controller.resync(settings.watch_namespaces, settings.resync_seconds),
            *(controller.work() for _ in range(settings.workers)),
        )

    def _controller(self) -> Controller:
        settings, cluster = self._settings, self._cluster
        reconciler = Reconciler(
            cluster=cluster,
            backend=PyTorchJobBackend(cluster),
            memory=self._memory,
            metrics=self._metrics,
            trainer_image=settings.trainer_image,
            report_base_url=settings.report_base_url,
            ca_bundle=self._certificates.ca_bundle,
            instance=settings.pod_name,
            preflight=settings.preflight,
            preflight_slots=PreflightSlots(settings.max_preflights, wake=self._queue.add),
            namespaces=settings.watch_namespaces,
            checkpoint_annotations=settings.checkpoint_annotations,
            network_policies=settings.network_policies,
        )
        return Controller(
            queue=self._queue,
            reconciler=reconciler,
            cluster=cluster,
            memory=self._memory,
            activity=self._activity,
            metrics=self._metrics,
        )

    def _announcements(self) -> list[Coroutine[None, None, None]]:
        """Return a list with the coroutine that keeps the report Service's EndpointSlice pointing to this pod.

        The list is empty where the operator runs outside a cluster. Training pods then send reports to `--report-host`.
        """
        settings = self._settings
        if not settings.pod_ip:
            return []
        endpoint = ReportEndpoint(
            namespace=settings.namespace,
            service=settings.report_service,
            address=settings.pod_ip,
            port=settings.report_port,
            pod_name=settings.pod_name,
            pod_uid=settings.pod_uid,
        )
        return [EndpointSlicePublisher(self._cluster, endpoint).publish_forever()]


def _certificate_source(settings: Settings, cluster: KubeClient) -> CertificateSource:
    """Return the source of the report server's certificate.

    The setting `--certificate-from` chooses: the operator makes the certificate itself, or reads a certificate that
    somebody else, such as cert-manager, maintains.
    """
    kind = SelfSignedCertificates if settings.certificate_from == "Operator" else ExternalCertificates
    return kind(
        cluster, namespace=settings.namespace, name=settings.certificate_secret, hostname=settings.report_hostname
    )


async def run(settings: Settings) -> None:
    """Run the operator until SIGTERM or SIGINT, and raise any exception that ends it earlier."""
    await Replica(settings, await load_configuration(settings.kubeconfig)).run()


def _stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set.

    While the watches run, kopf handles both signals itself and ends the watches. The end of the watches ends the
    operator as well.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def _until_first_ends(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Run all coroutines until the first ends or fails. Then cancel the others, and raise the failure, if any."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        # Exceptions of the cancelled tasks are dropped, because only the first failure is to be raised.
        await asyncio.gather(*tasks, return_exceptions=True)
