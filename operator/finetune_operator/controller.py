"""The workers, which take keys of jobs from the queue and reconcile these jobs, and the resync, which lists all jobs.

`application.py` starts both once this process is the leader.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from http import HTTPStatus
from typing import Final

from finetune_operator.kube.api_errors import REQUEST_ERRORS, ApiError, describe_error
from finetune_operator.kube.client import KubeClient
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reconcile import Reconciler

logger = logging.getLogger(__name__)

RECONCILE_SECONDS = 60.0
"""Time limit in seconds of one reconcile, so that a request that hangs does not block a worker."""
RESYNC_RETRY_SECONDS = 10.0
"""Seconds from a failed request for the list of a namespace's jobs to the next request."""
REFUSED: Final = (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
"""HTTP status codes with which the API server answers the request for a list of jobs where the namespace, or the
operator's Role in the namespace, does not exist."""


class _Listed:
    """Records for which namespaces the resync has listed the jobs. Marks the operator as ready once at least one list
    has succeeded, and the list of every other namespace has succeeded or was refused."""

    def __init__(self, namespaces: Collection[str | None], activity: WatchActivity, metrics: Metrics) -> None:
        self._waits = set(namespaces)
        self._failing: set[str | None] = set()
        self._activity = activity
        self._metrics = metrics
        self._any = False

    def succeeded(self, namespace: str | None) -> None:
        """Note that the jobs of ``namespace`` were listed."""
        self._any = True
        self._waits.discard(namespace)
        self._failing.discard(namespace)
        self._metrics.unlisted_namespaces.set(len(self._failing))
        self._activity.jobs_listed(of_all_namespaces=not self._waits)

    def failed(self, namespace: str | None, *, refused: bool) -> None:
        """Note that the jobs of ``namespace`` could not be listed.

        ``refused`` says whether the namespace does not exist or the operator may not list its jobs.
        """
        self._failing.add(namespace)
        self._metrics.unlisted_namespaces.set(len(self._failing))
        if refused:
            self._waits.discard(namespace)
        if self._any and not self._waits:
            self._activity.last_namespace_refused()


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
        """Reconcile the keys of ``queue`` with ``reconciler``. The resync lists jobs with ``cluster``.

        ``activity`` and ``metrics`` record what happens. ``memory`` says which jobs were known before, and which ended
        jobs need no reconcile.
        """
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
        """Queue the jobs as `_list` does, at once and then every ``seconds`` seconds, because a watch may lose events.
        Never returns.

        The jobs of each namespace in ``namespaces`` are listed apart, so that a deleted or forbidden namespace does not
        hold up the other namespaces. Where ``namespaces`` is empty, one list covers all namespaces. The operator is
        ready once at least one list has succeeded and every other list has succeeded or was refused.
        """
        unlisted: set[str | None] = set(namespaces or (None,))
        listed = _Listed(unlisted, self._activity, self._metrics)
        async with asyncio.TaskGroup() as loops:
            for namespace in unlisted:
                loops.create_task(self._resync(namespace, seconds, listed))

    async def _resync(self, namespace: str | None, seconds: float, listed: _Listed) -> None:
        """Queue the jobs of ``namespace`` (None: of all namespaces) at once, and then every ``seconds`` seconds.

        ``listed`` is informed about every list. Where the list has been refused for more than ``seconds`` seconds,
        nothing is known of the jobs any more, so their metrics are not exported until a list succeeds.
        """
        problem, refusals = "", 0
        while True:
            try:
                await self._list(namespace)
            except REQUEST_ERRORS as error:
                if describe_error(error) != problem:  # a namespace that stays forbidden gets one line in the log
                    problem = describe_error(error)
                    where = f"of namespace {namespace}" if namespace else "of all namespaces"
                    logger.warning("the jobs %s could not be listed: %s", where, problem)
                refused = isinstance(error, ApiError) and error.status in REFUSED
                listed.failed(namespace, refused=refused)
                refusals = refusals + 1 if refused else 0
                if refusals * RESYNC_RETRY_SECONDS > seconds:
                    self._metrics.jobs.hide(namespace)
                await asyncio.sleep(RESYNC_RETRY_SECONDS)
            else:
                problem, refusals = "", 0
                self._metrics.jobs.show(namespace)
                listed.succeeded(namespace)
                await asyncio.sleep(seconds)

    async def _list(self, namespace: str | None) -> None:
        """Queue the jobs of ``namespace`` that exist, and those that exist only in the operator's memory.

        A job that exists only in memory is queued because the watch may have lost the event of the job's deletion. A
        job is left out if its last reconcile found it ended and removed all objects that were due, and if it has not
        changed since.
        """
        gone = {key for key in self._memory.job_keys() if namespace in (None, key.namespace)}
        async for job in self._cluster.list_jobs(namespace):
            gone.discard(job.key)
            if not self._memory.has_settled(job.key, job.resource_version):
                self._queue.add_for_resync(job.key)
        for key in gone:
            self._queue.add_for_resync(key)

    async def _reconcile(self, key: Key) -> None:
        """Reconcile the job ``key`` once, and queue the key again where needed. If the reconcile fails, the key is
        queued after a back-off."""
        started = time.monotonic()
        set_log_fields(job=str(key))
        try:
            async with asyncio.timeout(RECONCILE_SECONDS):
                requeue = await self._reconciler.reconcile(key)
        except ApiError as error:
            if error.is_conflict or error.is_name_taken:
                # Somebody else changed or created an object between read and write. The first retry follows within
                # 0.2 s. Later retries wait longer, because a webhook may answer 409 for ever.
                self._count("conflict")
                self._queue.add_rate_limited(key)
            else:
                self._failed(key, error)
        except REQUEST_ERRORS as error:
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
            elif requeue.write is not None:
                self._queue.add_again(key)
            elif requeue.after is not None:
                self._queue.add_after(key, requeue.after)
        finally:
            set_log_fields()
            self._metrics.reconcile_seconds.observe(time.monotonic() - started)

    def _failed(self, key: Key, error: Exception) -> None:
        """Count and log a failed reconcile, and queue the key again after its back-off."""
        self._count("error")
        delay = self._queue.add_rate_limited(key)
        logger.warning("the reconcile failed: %s; next in %.1f s", describe_error(error), delay)

    def _count(self, result: str) -> None:
        self._metrics.reconciles.labels(result=result).inc()
