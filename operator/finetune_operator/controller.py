"""The workers that take keys from the queue, and the resync that lists all jobs. Started by `application`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import aiohttp

from finetune_operator.kube.client import ApiError, KubeClient
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import Key, WorkQueue
from finetune_operator.reconcile import Reconciler

logger = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""Longest time for one look: a request that hangs must not hold a worker for ever."""
CONFLICT_SECONDS = 0.2
"""Pause after somebody else changed the job between read and write."""
RESYNC_RETRY_SECONDS = 10.0


class Controller:
    """Works off the queue."""

    def __init__(
        self,
        *,
        queue: WorkQueue,
        reconciler: Reconciler,
        cluster: KubeClient,
        memory: Memory,
        activity: WatchActivity,
        metrics: Metrics,
    ) -> None:
        """Reconcile the keys of ``queue`` with ``reconciler``."""
        self._memory = memory
        self._queue = queue
        self._reconciler = reconciler
        self._cluster = cluster
        self._activity = activity
        self._metrics = metrics

    async def work(self) -> None:
        """Take key after key, for ever."""
        while True:
            key = await self._queue.get()
            try:
                await self._look(key)
            finally:
                self._queue.done(key)

    async def resync(self, namespaces: Sequence[str], seconds: float) -> None:
        """Queue every job now and every ``seconds``: what a watch lost is found here."""
        while True:
            try:
                await self._list_all(namespaces)
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the jobs could not be listed: %s", error)
                await asyncio.sleep(RESYNC_RETRY_SECONDS)
            else:
                self._activity.jobs_listed()
                await asyncio.sleep(seconds)

    async def _list_all(self, namespaces: Sequence[str]) -> None:
        """Queue every job that exists, and every one remembered: a deletion that no watch told is noticed so."""
        for key in self._memory.job_keys():
            self._queue.add(key)
        for namespace in namespaces or (None,):
            async for key in self._cluster.list_job_keys(namespace):
                self._queue.add(key)

    async def _look(self, key: Key) -> None:
        """Look at a job once; whatever goes wrong concerns this job only and is tried again after its back-off."""
        started = time.monotonic()
        set_log_fields(job=str(key))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                outcome = await self._reconciler.reconcile(key)
        except ApiError as error:
            if error.is_conflict:
                self._count("conflict")
                self._queue.add_after(key, CONFLICT_SECONDS)
            else:
                self._failed(key, error)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._failed(key, error)
        except Exception:
            # A job that no code was written for must not end the worker that serves all others.
            self._count("error")
            delay = self._queue.add_rate_limited(key)
            logger.exception("the look failed; next in %.1f s", delay)
        else:
            self._count("ok")
            self._queue.forget(key)
            if outcome.gone:
                self._queue.discard(key)
            elif outcome.after is not None:
                self._queue.add_after(key, outcome.after)
        finally:
            set_log_fields()
            self._metrics.reconcile_seconds.observe(time.monotonic() - started)

    def _failed(self, key: Key, error: Exception) -> None:
        self._count("error")
        delay = self._queue.add_rate_limited(key)
        logger.warning("the look failed: %s; next in %.1f s", str(error) or type(error).__name__, delay)

    def _count(self, result: str) -> None:
        self._metrics.reconciles.labels(result=result).inc()
