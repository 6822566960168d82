"""Reads the Kubernetes events about a job, its PyTorchJobs and its pods.

`finetune events` and `finetune describe` use `read_events`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import urllib3
from kubernetes import client

from finetune_cli.apiserver.following import CALL_TIMEOUT_SECONDS
from finetune_cli.apiserver.refusals import Request, explained, lost
from finetune_cli.terminal import printable_values
from finetune_core.api.job import KIND
from finetune_core.names import attempt_name

PAGE = 500
"""Number of events that are asked for at once, as kubectl does."""
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event about a job, or about an object of the job."""

    last: datetime
    """Time at which it happened last."""
    warning: bool
    reason: str
    about: str
    """Kind and name of the object, for example `Pod/quickstart-1a2b3c4d-1-worker-0`."""
    message: str
    count: int


def read_events(
    api: client.ApiClient, namespace: str, name: str, uid: str
) -> tuple[list[JobEvent], list[dict[str, Any]]]:
    """Return the events about the job ``name`` with this ``uid``, the oldest first, and the same events as the API
    server stores them. Raises UserError where the user may not list events."""
    found = sorted(
        (
            (event_of(printable_values(stored)), stored)
            for stored in _stored(api, namespace)
            if is_about(stored, name, uid)
        ),
        key=lambda pair: pair[0].last,
    )
    return [event for event, _ in found], [stored for _, stored in found]


def is_about(stored: Mapping[str, Any], name: str, uid: str) -> bool:
    """Return whether the event ``stored`` is about the job, or about an object whose name begins as those of the job's
    attempts do. Such a name contains a digest of the job's uid."""
    about = stored.get("regarding") or {}
    if about.get("kind") == KIND:
        return bool(about.get("name") == name and about.get("uid") in (uid, None, ""))
    return str(about.get("name", "")).startswith(attempt_name(name, uid, 0).removesuffix("0"))


def event_of(stored: Mapping[str, Any]) -> JobEvent:
    """Return ``stored``, an event of `events.k8s.io/v1`, as a JobEvent. Programs fill different fields in."""
    series = stored.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        stored.get("deprecatedLastTimestamp"),
        stored.get("eventTime"),
        (stored.get("metadata") or {}).get("creationTimestamp"),
    )
    about = stored.get("regarding") or {}
    count = series.get("count") or stored.get("deprecatedCount") or 1
    return JobEvent(
        last=next((time for time in map(_time, times) if time is not None), LONG_AGO),
        warning=stored.get("type") == "Warning",
        reason=str(stored.get("reason") or ""),
        about=f"{about.get('kind', '')}/{about.get('name', '')}",
        message=str(stored.get("note") or ""),
        count=count if isinstance(count, int) else 1,
    )


def _time(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _stored(api: client.ApiClient, namespace: str) -> Iterator[dict[str, Any]]:
    """Yield all events of the namespace as the API server stores them. They are read as custom objects, because the
    client's own models refuse events that lack a field."""
    custom, rest = client.CustomObjectsApi(api), ""
    while True:
        try:
            page = custom.list_namespaced_custom_object(
                "events.k8s.io",
                "v1",
                namespace,
                "events",
                limit=PAGE,
                _request_timeout=CALL_TIMEOUT_SECONDS,
                **({"_continue": rest} if rest else {}),
            )
        except client.ApiException as error:
            raise explained(error, Request("list", "events.events.k8s.io", f"events of {namespace}")) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error
        yield from page["items"]
        rest = page["metadata"].get("continue") or ""
        if not rest:
            return
