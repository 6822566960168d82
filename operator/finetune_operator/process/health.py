"""/healthz, /readyz and /metrics over plain HTTP for the kubelet and Prometheus.

/healthz is red when nothing was watched or listed for three resync periods: a watcher that died silently must not
leave an operator that looks alive. /readyz is green for a leader once its first list of all jobs succeeded, and for
a replica that waits for the Lease while it can read it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import web

from finetune_operator.process.leader_election import LeaderElector
from finetune_operator.process.metrics import CONTENT_TYPE, Metrics
from finetune_operator.queue.work_queue import WorkQueue

SILENT_PERIODS = 3


class WatchActivity:
    """When the world was last seen."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start as seen: a new process gets three periods for its first look."""
        self._clock = clock
        self._seen_at = clock()
        self.ready = False

    def seen(self) -> None:
        """Note that a watch brought an event."""
        self._seen_at = self._clock()

    def stood_by(self) -> None:
        """Note that a replica which waits for the Lease could read it: it is ready to take over."""
        self.seen()
        self.ready = True

    def began_to_lead(self) -> None:
        """Note that the jobs must be listed before this replica is ready."""
        self.seen()
        self.ready = False

    def listed(self) -> None:
        """Note that the list of all jobs succeeded."""
        self.seen()
        self.ready = True

    def age(self) -> float:
        """Return the seconds since the world was last seen."""
        return self._clock() - self._seen_at


class HealthServer:
    """Serves the three paths."""

    def __init__(
        self,
        *,
        activity: WatchActivity,
        queue: WorkQueue,
        metrics: Metrics,
        leadership: LeaderElector,
        resync_seconds: float,
    ) -> None:
        """Judge ``activity`` by ``resync_seconds``."""
        self._activity = activity
        self._queue = queue
        self._metrics = metrics
        self._leadership = leadership
        self._limit = SILENT_PERIODS * resync_seconds
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return the web application."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._render)
        return application

    async def start(self, port: int) -> None:
        """Listen on ``port`` of every address."""
        self._runner = web.AppRunner(self.application(), handle_signals=False, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, port=port).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

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
        self._metrics.queue_depth.set(len(self._queue))
        self._metrics.queue_age_seconds.set(self._queue.oldest_age())
        self._metrics.watch_age_seconds.set(self._activity.age())
        self._metrics.leader.set(self._leadership.leads)
        self._metrics.lease_age_seconds.set(self._leadership.age())
        # With thousands of jobs the text takes a while: the event loop goes on meanwhile.
        text = await asyncio.to_thread(self._metrics.render)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})
