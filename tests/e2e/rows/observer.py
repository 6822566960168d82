"""Record every change of FineTuneJobs and their pods, with the time of the change. All test cases share two watches,
one for jobs and one for pods. So the cases need not poll the API server.

One watch may lag behind the other. If the time of a change were the time of its arrival, a cause could get a later time
than its consequence. But the resourceVersions of all objects come from one counter. The time of a write is therefore
the first time at which this write, or a write with a higher resourceVersion, was observed.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client, watch

from examples.demo import steps
from finetune_core.api.job import GROUP, PLURAL, VERSION
from finetune_operator.objects.labels import JOB_UID
from tests.cluster import Cluster, ClusterError

Manifest = dict[str, Any]
WATCH_SECONDS = 5
"""Seconds after which a watch request ends. The next request goes on from the last resourceVersion."""


@dataclass(frozen=True)
class Sighting:
    """A state of an object that a watch has delivered. The state was written at the time ``at`` (`time.monotonic`) or
    earlier."""

    at: float
    object: Manifest
    deleted: bool = False


class Timeline:
    """Computes the time of each write from its resourceVersion. All watches on one API server share one `Timeline`."""

    def __init__(self) -> None:
        self._revisions: list[int] = []
        self._moments: list[float] = []

    def date(self, revision: int, now: float) -> float:
        """Return the first time at which a write with the resourceVersion ``revision``, or with a higher
        resourceVersion, was observed. ``now`` is the present time. The caller has just got the write with ``revision``
        from a watch."""
        later = bisect.bisect_left(self._revisions, revision)
        if later < len(self._revisions):
            return self._moments[later]
        self._revisions.append(revision)
        self._moments.append(now)
        return now


class Observer:
    """Watches all FineTuneJobs and their pods, and keeps every observed state by kind, namespace and name of the
    object."""

    def __init__(self) -> None:
        self._timeline = Timeline()
        self._seen: dict[tuple[str, str, str], list[Sighting]] = defaultdict(list)
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @contextmanager
    def watching(self, cluster: Cluster) -> Iterator[None]:
        """Watch the FineTuneJobs and their pods in threads during the block."""
        threads = [threading.Thread(target=self._watch, args=(cluster, kind), daemon=True) for kind in ("job", "pod")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(WATCH_SECONDS + 10)

    def history(self, kind: str, namespace: str, name: str) -> list[Sighting]:
        """Return all observed states of an object so far, oldest first."""
        with self._changed:
            return list(self._seen[kind, namespace, name])

    def first(
        self,
        kind: str,
        namespace: str,
        name: str,
        what: str,
        reached: Callable[[Sighting], Any],
        timeout: float,
    ) -> Sighting:
        """Wait until a state is observed for which ``reached`` holds, and return the first such state. States that were
        observed before the call count too.

        Raises:
            ClusterError: no such state was observed within ``timeout`` seconds, and the message holds the last status;
            or a watch has failed.
        """
        deadline, looked_at = time.monotonic() + timeout, 0
        with self._changed:
            while True:
                seen = self._seen[kind, namespace, name]
                while looked_at < len(seen):
                    sighting = seen[looked_at]
                    looked_at += 1
                    if reached(sighting):
                        return sighting
                if self._error is not None:
                    raise ClusterError(f"watching {kind}s failed") from self._error
                left = deadline - time.monotonic()
                if left <= 0:
                    last = seen[-1].object.get("status") if seen else "never seen"
                    raise ClusterError(f"waited {timeout:g} s for {what} of {kind} {namespace}/{name}: {last}")
                self._changed.wait(left)

    def _watch(self, cluster: Cluster, kind: str) -> None:
        try:
            with cluster.enter(), steps.kubernetes_client(cluster) as api:
                version: str | None = None
                while not self._ended.is_set():
                    try:
                        version = self._stream(api, kind, version)
                    except (urllib3.exceptions.HTTPError, client.ApiException) as error:
                        # The API server may be unavailable for a moment, so the watch is started again. The new watch
                        # begins with a list of all current objects.
                        print(f"watching {kind}s again after: {error}")
                        version = None
                        self._ended.wait(0.5)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise

    def _stream(self, api: client.ApiClient, kind: str, version: str | None) -> str | None:
        """Watch for a few seconds and record all changes since the resourceVersion ``version``. If it is None, record
        all current objects first. Return the resourceVersion from which the next watch must go on."""
        limits: dict[str, Any] = {"timeout_seconds": WATCH_SECONDS, "_request_timeout": WATCH_SECONDS + 5}
        if version:
            limits["resource_version"] = version
        watcher = watch.Watch()
        if kind == "pod":
            core = client.CoreV1Api(api)
            events = watcher.stream(core.list_pod_for_all_namespaces, label_selector=JOB_UID, **limits)
        else:
            custom = client.CustomObjectsApi(api)
            events = watcher.stream(custom.list_cluster_custom_object, GROUP, VERSION, PLURAL, **limits)
        for event in events:
            self._add(kind, event["raw_object"], deleted=event["type"] == "DELETED")
        return str(watcher.resource_version) if watcher.resource_version else None

    def _add(self, kind: str, found: Manifest, *, deleted: bool) -> None:
        metadata = found["metadata"]
        with self._changed:
            seen = self._seen[kind, metadata["namespace"], metadata["name"]]
            known = seen and seen[-1].object["metadata"]["resourceVersion"] == metadata["resourceVersion"]
            if not known or deleted:
                moment = self._timeline.date(int(metadata["resourceVersion"]), time.monotonic())
                seen.append(Sighting(moment, found, deleted))
                self._changed.notify_all()
