"""The workers, which take keys of jobs from the queue and reconcile these jobs, and the resync, which lists all jobs.

`application.py` starts both once this process is the leader.
"""

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

RECONCILE_SECONDS = 60.0
"""Time limit in seconds of one reconcile, so that a request that hangs does not block a worker."""
RESYNC_RETRY_SECONDS = 10.0
"""Seconds after a failed list of all jobs until the jobs are listed again."""


class Controller:
    """Takes the keys of jobs out of the queue, hands them to the reconciler, and queues a key again when needed."""

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
        """Reconcile the keys of ``queue`` with ``reconciler``; ``activity`` and ``metrics`` record what happens."""
        self._memory = memory
        self._queue = queue
        self._reconciler = reconciler
        self._cluster = cluster
        self._activity = activity
        self._metrics = metrics

    async def work(self) -> None:
        """Reconcile one key after another until the task is cancelled. Several workers may run at once."""
        while True:
            key = await self._queue.get()
            try:
                await self._reconcile(key)
            finally:
                self._queue.done(key)

    async def resync(self, namespaces: Sequence[str], seconds: float) -> None:
        """Queue every job now and again every ``seconds``, because a watch may lose events. Never returns."""
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
        """Queue every job that exists, and every job that the memory holds.

        The latter is needed for jobs that were deleted without a watch event.
        """
        for key in self._memory.job_keys():
            self._queue.add(key)
        for namespace in namespaces or (None,):
            async for key in self._cluster.list_job_keys(namespace):
                self._queue.add(key)

    async def _reconcile(self, key: Key) -> None:
        """Reconcile a job once, and queue it again where needed. After a failure the job waits for its own back-off."""
        started = time.monotonic()
        set_log_fields(job=str(key))
        try:
            async with asyncio.timeout(RECONCILE_SECONDS):
                requeue = await self._reconciler.reconcile(key)
        except ApiError as error:
            if error.is_conflict or error.is_name_taken:
                # Somebody else changed an object between read and write. The first retry follows after 0.2 s. The next
                # ones wait longer, because a webhook may answer 409 for ever.
                self._count("conflict")
                self._queue.add_rate_limited(key)
            else:
                self._failed(key, error)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._failed(key, error)
        except Exception:
            # An unexpected exception for one job must not end the worker, which serves all jobs.
            self._count("error")
            delay = self._queue.add_rate_limited(key)
            logger.exception("the reconcile failed; next in %.1f s", delay)
        else:
            self._count("ok")
            self._queue.forget(key)
            if requeue.gone:
                self._queue.discard(key)
            elif requeue.after is not None:
                self._queue.add_after(key, requeue.after)
        finally:
            set_log_fields()
            self._metrics.reconcile_seconds.observe(time.monotonic() - started)

    def _failed(self, key: Key, error: Exception) -> None:
        """Count and log a failed reconcile, and queue the key again after its back-off."""
        self._count("error")
        delay = self._queue.add_rate_limited(key)
        logger.warning("the reconcile failed: %s; next in %.1f s", str(error) or type(error).__name__, delay)

    def _count(self, result: str) -> None:
        self._metrics.reconciles.labels(result=result).inc()
