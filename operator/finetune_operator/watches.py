"""The only module that knows kopf: watch streams turn into keys in the queue, nothing else.

Each setting carries its reason; the traps behind them were met with kopf 1.45. No handler changes an object, so
kopf adds no finalizer and no annotation.
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
"""What kopf gets for its end: two seconds for its workers, five for what hangs, and room on a busy machine."""
WATCH_EXIT_CODE: Final = 1


class _EndlessBackoff:
    """Delays between tries of a watch: 1 s to 10 s with jitter, without end.

    kopf's own list ends after 54 s and then the process: an API server that is away for two minutes would throw
    the operator into CrashLoopBackOff.
    """

    def __iter__(self) -> Iterator[float]:
        delay = 1.0
        while True:
            yield delay * random.uniform(0.75, 1.0)  # noqa: S311  (jitter, no secret)
            delay = min(10.0, delay * 1.6)


class _NoDiffs(kopf.DiffBaseStorage):
    """Compares nothing: `on.event` needs no diff of an object, and copying each object twice for one takes a quarter
    of the process's time when a thousand jobs run."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        raise AssertionError("no handler changes an object")


def _settings(*, confined: bool) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True  # peering freezes or doubles operators; it is no leader election
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.posting.enabled = False  # events are made on transitions, after the status was written
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.watching.server_timeout = 300  # behind load balancers a watch can fall silent
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    for owned in (PODS, PYTORCHJOBS):
        settings.watching.label_selectors[owned.group, owned.version, owned.plural] = OWNED_OBJECTS_SELECTOR
    settings.queueing.worker_limit = None  # a limit holds slots of idle objects; our own workers are the limit
    settings.queueing.idle_timeout = 0.5  # a task and the object itself stay that long: 5 s are all jobs at a restart
    settings.scanning.disabled = confined  # needs a list of CRDs, which an operator of some namespaces has not
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
        # Called anew after a 401, which a service-account token that the kubelet rotated leads to.
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
        # At a start and after a break every job comes again, and the resync has brought most of them already.
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
    """Watch jobs, children and pods until SIGTERM, or raise where a watcher died: the process must end then.

    Where kopf does not come to its end it ends the process itself: kopf waits without a bound for its other watches,
    and one that misses its cancellation would leave an operator that lists but watches nothing.
    """
    others = asyncio.all_tasks()
    roots = await kopf.spawn_tasks(
        registry=_registry(queue, memory, activity, configuration),
        settings=_settings(confined=bool(namespaces)),
        # Unset, kopf asks the system for the user's name, and the image has no name for its user.
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
