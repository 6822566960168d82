"""Watches FineTuneJobs, PyTorchJobs and pods with kopf, and puts the key of the affected job into the queue.

`application.py` starts `watch`. No other module imports kopf. No handler changes an object, so kopf adds no finalizer
and no annotation. Settings that differ from kopf's defaults have their reason beside them, as observed with kopf 1.45.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import kopf

from finetune_core.api import GROUP, PLURAL, VERSION
from finetune_operator.kube.resources import PODS, PYTORCHJOBS
from finetune_operator.objects.labels import OWNED_OBJECTS_SELECTOR, job_key
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.leader_election import end_process
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import Key, WorkQueue

logger = logging.getLogger(__name__)

STOP_SECONDS: Final = 15.0
"""Time for kopf to end: two seconds for its workers, five for hanging tasks, and as much again on a busy machine."""
WATCH_EXIT_CODE: Final = 1
"""Exit code of a process in which one watch has ended and the others did not follow."""


class _EndlessBackoff:
    """An endless sequence of delays between tries of a watch: from 1 s up to 10 s, with jitter.

    kopf's default list ends after 54 s, and then kopf ends. An API server that is away for two minutes would bring the
    operator into CrashLoopBackOff.
    """

    def __iter__(self) -> Iterator[float]:
        delay = 1.0
        while True:
            yield delay * random.uniform(0.75, 1.0)  # noqa: S311  (jitter, no secret)
            delay = min(10.0, delay * 1.6)


class _NoDiffs(kopf.DiffBaseStorage):
    """A storage of object states that stores none, because handlers of `on.event` need no difference between states.

    kopf's default copies each object twice for a difference, which took a quarter of the CPU time with 1,000 jobs.
    """

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        raise AssertionError("no handler changes an object")


def _settings(*, confined: bool) -> kopf.OperatorSettings:
    """Return kopf's settings; ``confined`` says whether the operator serves some namespaces only."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True  # peering is no leader election: it may pause every operator, or none
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.posting.enabled = False  # `status/event_recorder.py` creates events about changes of the status
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.watching.server_timeout = 300  # a load balancer may drop a watch without closing its connection
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    for owned in (PODS, PYTORCHJOBS):
        settings.watching.label_selectors[owned.group, owned.version, owned.plural] = OWNED_OBJECTS_SELECTOR
    settings.queueing.worker_limit = None  # objects without events would use up the limit; our workers are limited
    settings.queueing.idle_timeout = 0.5  # kopf keeps each object in memory for this long after its last event
    settings.scanning.disabled = confined  # scanning lists CRDs, and a confined operator has no permission for that
    return settings


def _connection(configuration: Any, scheme: str | None, token: str | None) -> kopf.ConnectionInfo:
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=scheme,
        token=token,
    )


def _registry(queue: WorkQueue, memory: Memory, activity: WatchActivity, configuration: Any) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        # kopf logs in again after a 401, because the kubelet rotates the token of the service account.
        header = await configuration.get_api_key_with_prefix("BearerToken") or ""
        scheme, token = header.split(" ", 1) if " " in header else (None, header)
        return _connection(configuration, scheme, token or None)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_event(
        namespace: str | None, name: str | None, event: Mapping[str, Any], meta: Mapping[str, Any], **_: Any
    ) -> None:
        activity.event_received()
        if not (namespace and name):
            return
        key = Key(namespace, name)
        # At the start and after a broken watch kopf repeats every job, and most are known from the resync.
        if event["type"] == "DELETED" or not memory.has_read(key, meta.get("resourceVersion", "")):
            queue.add(key)

    @kopf.on.event(PODS.group, PODS.version, PODS.plural, registry=registry)
    @kopf.on.event(PYTORCHJOBS.group, PYTORCHJOBS.version, PYTORCHJOBS.plural, registry=registry)
    async def owned_event(namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        activity.event_received()
        if key := job_key(namespace, labels):
            queue.add(key)

    return registry


async def watch(
    *, queue: WorkQueue, memory: Memory, activity: WatchActivity, configuration: Any, namespaces: tuple[str, ...]
) -> None:
    """Watch jobs, children and pods until SIGTERM; raises where a watch failed, so that the process ends.

    kopf waits without a time limit for its other watches when one ends, and a watch may miss its cancellation. Where
    kopf does not end in time, the process is ended at once, because it would list jobs but watch nothing.
    """
    others = asyncio.all_tasks()
    roots = await kopf.spawn_tasks(
        registry=_registry(queue, memory, activity, configuration),
        settings=_settings(confined=bool(namespaces)),
        # Without an identity kopf asks the system for the user's name, and the image's user has no name.
        identity=cast(Any, socket.gethostname()),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
    )
    watching = asyncio.ensure_future(kopf.run_tasks(roots, ignored=others))
    try:
        await asyncio.wait(roots, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        watching.cancel()
        await asyncio.wait([watching], timeout=STOP_SECONDS)
        raise
    await asyncio.wait([watching], timeout=STOP_SECONDS)
    if not watching.done():
        logger.error("a watch has ended, and the others did not follow within %.0f s: the process ends", STOP_SECONDS)
        end_process(WATCH_EXIT_CODE)
    await watching
