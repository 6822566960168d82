"""Watches FineTuneJobs, PyTorchJobs and pods with kopf, and puts the key of the affected job into the queue.

`application.py` starts `watch`. No other module imports kopf. No handler changes an object, so kopf adds no finalizer
and no annotation. The reasons in the comments on kopf's settings were observed with kopf 1.45.
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
from finetune_operator.kube.watch_session import watch_session
from finetune_operator.objects.labels import OWNED_OBJECTS_SELECTOR, job_key
from finetune_operator.process.health import WatchActivity
from finetune_operator.process.leader_election import end_process
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue

logger = logging.getLogger(__name__)

STOP_SECONDS: Final = 15.0
"""Largest number of seconds that kopf may take to end. kopf waits two seconds for its workers and five for tasks that
hang. On a busy machine the end may take twice as long."""
WATCH_EXIT_CODE: Final = 1
"""Exit code of the process where one watch has ended and the other watches did not end in time."""


class _EndlessBackoff:
    """An endless sequence of delays between tries of a watch: from 1 s up to 10 s, each up to a quarter shorter at
    random.

    kopf ends when the list of delays ends, and its default list ends after 54 s. With that list, an API server that is
    away for two minutes would make the operator's pod restart again and again (CrashLoopBackOff).
    """

    def __iter__(self) -> Iterator[float]:
        delay = 1.0
        while True:
            yield delay * random.uniform(0.75, 1.0)  # noqa: S311  (jitter, no secret)
            delay = min(10.0, delay * 1.6)


class _NoDiffs(kopf.DiffBaseStorage):
    """Makes kopf keep no earlier states of objects, because handlers of `on.event` do not compare states.

    kopf's default copies each object twice for such comparisons. These copies took a quarter of the CPU time with 1,000
    jobs.
    """

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        raise AssertionError("no handler changes an object")


def _settings(*, confined: bool) -> kopf.OperatorSettings:
    """Return the settings of kopf; ``confined`` says whether the operator serves only some namespaces."""
    settings = kopf.OperatorSettings()
    # kopf's own leader election (peering) is off, because it may pause all replicas at once, or none.
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.posting.enabled = False  # kopf posts no events; `status/event_recorder.py` creates them
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.watching.server_timeout = 300  # seconds; short, because a load balancer may silently drop a watch
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    for owned in (PODS, PYTORCHJOBS):
        settings.watching.label_selectors[owned.group, owned.version, owned.plural] = OWNED_OBJECTS_SELECTOR
    settings.queueing.worker_limit = None  # no limit, because objects without new events would count against a limit
    settings.queueing.idle_timeout = 0.5  # seconds that kopf keeps an object in memory after an event
    settings.scanning.disabled = confined  # a confined operator has no permission to list CRDs
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


class _Login:
    """Logs kopf in with a session that bounds `Retry-After`."""

    def __init__(self) -> None:
        self._known: tuple[kopf.ConnectionInfo, kopf.AiohttpSession] | None = None

    def session(self, info: kopf.ConnectionInfo) -> kopf.AiohttpSession:
        """Return the credentials ``info`` with a session; for the credentials of the last call, return the same object.

        After a 401, kopf compares the new credentials with the refused credentials, and ends where both are equal. If
        this method returned another object each time, kopf would log in again and again without a pause.
        """
        if self._known is None or self._known[0] != info:
            session = watch_session(info.as_http_headers(), info.as_ssl_context())
            self._known = info, kopf.AiohttpSession(server=info.server, aiohttp_session=session)
        return self._known[1]


def _registry(queue: WorkQueue, memory: Memory, activity: WatchActivity, configuration: Any) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    logins = _Login()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        # The token is read anew at each login: the kubelet rotates the token, and kopf logs in again after a 401.
        header = await configuration.get_api_key_with_prefix("BearerToken") or ""
        scheme, token = header.split(" ", 1) if " " in header else (None, header)
        return logins.session(_connection(configuration, scheme, token or None))

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_event(
        namespace: str | None, name: str | None, event: Mapping[str, Any], meta: Mapping[str, Any], **_: Any
    ) -> None:
        activity.event_received()
        key = Key.parse(namespace or "", name or "")
        if key is None:
            return
        # At the start and after a broken watch, kopf sends an event for every job. A job whose resourceVersion a
        # reconcile has read already is not queued again.
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
    """Watch jobs, child objects and pods in ``namespaces`` until SIGTERM. An empty tuple means all namespaces.

    Raises where a watch failed, so that the process ends. When one watch ends, kopf cancels the other watches and waits
    for them without a time limit. A watch may miss its cancellation, and the operator would then go on without watches.
    So the process is ended where kopf takes too long.
    """
    others = asyncio.all_tasks()
    roots = await kopf.spawn_tasks(
        registry=_registry(queue, memory, activity, configuration),
        settings=_settings(confined=bool(namespaces)),
        # An identity is given, because kopf would otherwise ask the system for the user's name, and the user of the
        # image has no name.
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
