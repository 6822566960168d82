"""Follows jobs: yields the newest states of all selected jobs after each change, also when the connection breaks.

`job_client.py` follows one job with it, and `finetune watch` all jobs of a namespace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import urllib3
from kubernetes import client, watch

from finetune_cli.apiserver.refusals import JOBS, ConnectionLostError, RefusedError, Request, explained, lost
from finetune_cli.apiserver.selection import Key, Selection, key_of
from finetune_cli.formatting import duration
from finetune_core.api.job import GROUP, KIND, PLURAL, VERSION
from finetune_core.errors import UserError

CALL_TIMEOUT_SECONDS = (5, 30)
"""Two timeouts of a call to the API server in seconds: for the connection, and for the answer."""
WATCH_SECONDS = 30
"""Seconds after which the API server ends a watch and the client starts a new watch. With a short time, a connection
that was lost without an error is replaced soon."""
RECONNECT_FOR_SECONDS = 600
"""Seconds for which the client tries again to reach an API server that no longer answers."""
REFUSED_FOR_SECONDS = 30
"""Seconds for which the client asks again although the API server refuses the user, who was allowed to list the jobs
before. An API server that has just started refuses everybody until it has read the roles."""
RECONNECT_DELAYS_SECONDS = (1, 2, 4, 8, 15)
"""Pauses in seconds between tries to reach the API server. The last pause repeats."""
SHORTEST_WATCH_SECONDS = 1.0
"""A watch that ends sooner is followed by a pause, because something between here and the API server may end every
watch at once."""
GONE = 410
"""Status code for a watch from a resourceVersion that the API server no longer remembers."""

Snapshot = Mapping[Key, dict[str, Any]]
"""The selected jobs as the API server stores them."""


class JobFollower:
    """Lists the jobs of a selection, and follows them."""

    def __init__(self, api: client.ApiClient, selection: Selection) -> None:
        self._custom = client.CustomObjectsApi(api)
        self._selection = selection
        place = selection.namespace or "all namespaces"
        self._subject = f"{KIND} {place}/{selection.names[0]}" if len(selection.names) == 1 else f"{KIND}s of {place}"

    def stored_jobs(self) -> tuple[dict[Key, dict[str, Any]], str]:
        """Return the stored jobs, and the resourceVersion from which a watch can continue. Raises UserError where the
        user may not list jobs, and ConnectionLostError where the API server can't be reached or has a problem of its
        own."""
        try:
            found = self._ask(**self._arguments(), _request_timeout=CALL_TIMEOUT_SECONDS)
        except client.ApiException as error:
            raise explained(error, Request("list", JOBS, self._subject)) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error
        jobs = {key_of(stored): stored for stored in found["items"] if self._selection.has(stored)}
        return jobs, found["metadata"]["resourceVersion"]

    def follow(self, notify: Callable[[str], None], *, give_up_after: float | None = None) -> Iterator[Snapshot]:
        """Yield all selected jobs now and after each change. The iterator does not end by itself. ``notify`` is called
        with a sentence when the connection is lost.

        If ``give_up_after`` is given, raises TimeoutError after that many seconds. Raises UserError when the jobs may
        not be listed, or when the API server does not answer for ten minutes. Raises ConnectionLostError when, at the
        start, the API server can't be reached or has a problem of its own.
        """
        until = time.monotonic() + give_up_after if give_up_after is not None else math.inf
        # This first call is not repeated where no API server answers, because at the start a wrong kubeconfig is a more
        # likely cause than a restart of the API server.
        jobs, version = self.stored_jobs()
        yield dict(jobs)
        while (left := until - time.monotonic()) > 0:
            began, whole = time.monotonic(), True
            try:
                for kind, stored in self._changes(version, min(left, WATCH_SECONDS)):
                    version = stored["metadata"]["resourceVersion"]
                    if kind == "BOOKMARK" or not self._selection.has(stored):
                        continue
                    if kind == "DELETED":
                        jobs.pop(key_of(stored), None)
                    else:
                        jobs[key_of(stored)] = stored
                    yield dict(jobs)
            except ConnectionLostError as error:
                notify(f"lost the connection to the API server ({error}); trying again")
                whole = False
            except (RefusedError, _TooOldError):
                whole = False
            if (pause := SHORTEST_WATCH_SECONDS - (time.monotonic() - began)) > 0:
                time.sleep(max(0.0, min(pause, until - time.monotonic())))
            # A watch that ended as asked for is followed by another from where it ended. Another list would be large
            # where a namespace has many jobs.
            if whole:
                continue
            listed, version = self._list_with_retries(notify)
            if _versions(listed) != _versions(jobs):
                jobs = listed
                yield dict(jobs)
        raise TimeoutError(f"{self._subject} was followed for {give_up_after} s")

    def _list_with_retries(self, notify: Callable[[str], None]) -> tuple[dict[Key, dict[str, Any]], str]:
        """Return the result of `stored_jobs`. Where no API server answers, try again for ten minutes, which is long
        enough for most restarts of an API server, and then raise UserError. ``notify`` is called with a sentence about
        the outage."""
        began = time.monotonic()
        for attempt in range(RECONNECT_FOR_SECONDS):
            delay = RECONNECT_DELAYS_SECONDS[min(attempt, len(RECONNECT_DELAYS_SECONDS) - 1)]
            left = began + RECONNECT_FOR_SECONDS - time.monotonic()
            try:
                return self.stored_jobs()
            except RefusedError:
                if time.monotonic() + delay > began + REFUSED_FOR_SECONDS:
                    raise
            except ConnectionLostError as error:
                if delay > left:
                    raise UserError(
                        "API server", f"no answer for {duration(RECONNECT_FOR_SECONDS)} ({error})"
                    ) from error
                if attempt == 1:
                    notify(f"the API server does not answer ({error}); trying again")
            # The loop ends after about RECONNECT_FOR_SECONDS, because a longer pause raises one of the errors above.
            time.sleep(delay)
        raise UserError("API server", f"no answer for {duration(RECONNECT_FOR_SECONDS)}")

    def _changes(self, resource_version: str, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the kind of each change since ``resource_version`` (ADDED, MODIFIED, DELETED or BOOKMARK) with the
        stored job, until the API server ends the watch after ``seconds``. A bookmark has only a resourceVersion. Raises
        _TooOldError where the API server no longer remembers ``resource_version``."""
        stream = watch.Watch()
        # The library finds out what a request returns from the docstring of its function, so the function must be the
        # client's own.
        function = (
            self._custom.list_cluster_custom_object
            if self._selection.namespace is None
            else self._custom.list_namespaced_custom_object
        )
        try:
            for event in stream.stream(
                function,
                **self._arguments(),
                resource_version=resource_version,
                allow_watch_bookmarks=True,
                timeout_seconds=math.ceil(seconds),
                _request_timeout=(CALL_TIMEOUT_SECONDS[0], WATCH_SECONDS + 10),
            ):
                yield event["type"], event["object"]
        except client.ApiException as error:
            if error.status == GONE:
                raise _TooOldError from error
            raise explained(error, Request("watch", JOBS, self._subject)) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error
        except (KeyError, TypeError) as error:
            # The answer is JSON, but none of a watch.
            raise ConnectionLostError("the answer is no watch of Kubernetes") from error
        finally:
            stream.stop()

    def _ask(self, **arguments: Any) -> dict[str, Any]:
        if self._selection.namespace is None:
            return dict(self._custom.list_cluster_custom_object(**arguments))
        return dict(self._custom.list_namespaced_custom_object(**arguments))

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments that select the jobs. A selector that is absent is left out, because the client refuses
        None."""
        chosen = {
            "namespace": self._selection.namespace,
            "field_selector": self._selection.fields,
            "label_selector": self._selection.labels,
        }
        place = {"group": GROUP, "version": VERSION, "plural": PLURAL}
        return place | {name: value for name, value in chosen.items() if value is not None}


class _TooOldError(Exception):
    """The API server no longer remembers the resourceVersion that a watch should continue from."""


def _versions(jobs: Snapshot) -> dict[Key, str]:
    return {key: stored["metadata"]["resourceVersion"] for key, stored in jobs.items()}
