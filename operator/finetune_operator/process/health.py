"""The paths /healthz, /readyz and /metrics over plain HTTP, for the kubelet and Prometheus.

/healthz fails when the API server has sent nothing for three resync periods: no watch event and no list of jobs to the
leader, or no Lease to a replica that waits for the Lease. The kubelet then restarts the operator, because its
connections may hang. /readyz succeeds for the leader once it has listed the jobs of every served namespace, except
namespaces that are deleted or forbidden; if all are, /readyz fails. For a replica that waits for the Lease, /readyz
succeeds once the replica has read the Lease.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

from aiohttp import web

from finetune_operator.process.connections import ConnectionLimits
from finetune_operator.process.http_server import HttpServer
from finetune_operator.process.leader_election import LeaderElector
from finetune_operator.process.metrics import CONTENT_TYPE, Metrics
from finetune_operator.queue.work_queue import WorkQueue

STALE_RESYNC_PERIODS = 3
"""Number of resync periods after which /healthz fails if the API server has sent nothing."""
PIECE_BYTES = 32 * 1024
"""Bytes of /metrics that are sent at once. If the whole text were sent at once, several megabytes would be copied for
each client that does not read the text."""
METRICS_SECONDS = 1.0
"""Shortest time in seconds between two renderings of /metrics, because a rendering takes half a second of CPU time with
thousands of jobs. Requests in between get the text of the last rendering."""


class WatchActivity:
    """Records when the API server last sent something: a watch event or a list of jobs to the leader, or the Lease to a
    replica that waits for it."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the start of the process as the last activity, so that /healthz succeeds at first.

        ``clock`` returns monotonic seconds.
        """
        self._clock = clock
        self._last_activity = clock()
        self.ready = False
        """Whether /readyz succeeds."""

    def event_received(self) -> None:
        """Record that a watch has received an event."""
        self._last_activity = self._clock()

    def lease_read(self) -> None:
        """Record that this replica, which does not lead yet, has read the Lease. So it counts as ready to take over."""
        self.event_received()
        self.ready = True

    def started_leading(self) -> None:
        """Record that this replica is now the leader, and so is not ready until it has listed all jobs."""
        self.event_received()
        self.ready = False

    def jobs_listed(self, *, of_all_namespaces: bool = True) -> None:
        """Record that a list of jobs has succeeded.

        ``of_all_namespaces`` says whether the list of every namespace has now succeeded or was refused. The leader is
        then ready.
        """
        self.event_received()
        self.ready = self.ready or of_all_namespaces

    def last_namespace_refused(self) -> None:
        """Record that the leader is ready, because all namespaces without a list of jobs are deleted or forbidden."""
        self.ready = True

    def age(self) -> float:
        """Return the seconds since the API server last sent something."""
        return self._clock() - self._last_activity


class HealthServer(HttpServer):
    """Serves /healthz, /readyz and /metrics."""

    # Connections without TLS are cheap. Many connections are accepted in a second, because the kubelet restarts an
    # operator whose probes get no connection. On average one address may make as many new connections per second as all
    # addresses together, and may hold all connections, because the kubelet shares its address with pods in the host's
    # network and with pods whose address is translated.
    limits = ConnectionLimits(
        connections=256, per_address=2000, handshakes_per_second=1000.0, requests_per_second=1000.0
    )

    def __init__(
        self,
        *,
        activity: WatchActivity,
        queue: WorkQueue,
        metrics: Metrics,
        leadership: LeaderElector,
        resync_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the parts whose state is served.

        /healthz fails once the last activity in ``activity`` is more than three resync periods ago, each of
        ``resync_seconds``. ``clock`` returns monotonic seconds.
        """
        self._activity = activity
        self._queue = queue
        self._metrics = metrics
        self._leadership = leadership
        self._limit = STALE_RESYNC_PERIODS * resync_seconds
        self._clock = clock
        self._rendering = asyncio.Lock()
        self._rendered_at = -math.inf
        self._rendered = b""

    def application(self) -> web.Application:
        """Return the web application with the three paths."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._render)
        return application

    async def _healthz(self, _request: web.Request) -> web.Response:
        age = self._activity.age()
        if age > self._limit:
            return web.Response(
                status=HTTPStatus.SERVICE_UNAVAILABLE, text=f"nothing was watched or listed for {age:.0f} s\n"
            )
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        if not self._activity.ready:
            return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE, text="the jobs have not been listed yet\n")
        return web.Response(text="ok\n")

    async def _render(self, _request: web.Request) -> web.Response:
        async with self._rendering:
            if self._clock() - self._rendered_at >= METRICS_SECONDS:
                self._set_gauges()
                # The text is rendered in a thread, because with thousands of jobs the rendering would block the event
                # loop for long.
                self._rendered = await asyncio.to_thread(self._metrics.render)
                self._rendered_at = self._clock()
            text = self._rendered
        return web.Response(body=_pieces(text), headers={"Content-Type": CONTENT_TYPE})

    def _set_gauges(self) -> None:
        self._metrics.queue_depth.set(len(self._queue))
        self._metrics.queue_age_seconds.set(self._queue.oldest_age())
        self._metrics.watch_age_seconds.set(self._activity.age())
        self._metrics.leader.set(self._leadership.is_leader)
        self._metrics.lease_age_seconds.set(self._leadership.age())


async def _pieces(text: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(text), PIECE_BYTES):
        yield text[start : start + PIECE_BYTES]
