"""Rules of the fault proxy. A rule selects requests by verb, path and count, and contains the fault that the proxy
injects into these requests.

Faults are plain values; `proxy.py` injects them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
"""One line of a watch stream: a dictionary with the keys `type` and `object`."""

WRITES = frozenset({"create", "update", "patch", "delete"})
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its Kubernetes verb, as in the API server's audit log."""

    verb: str
    path: str
    query: Mapping[str, str]

    @classmethod
    def of(cls, method: str, path: str, query: Mapping[str, str]) -> Request:
        """Return the request for an HTTP method, path and query. A GET of a collection is a list or a watch."""
        if method != "GET":
            return cls(_VERBS[method], path, query)
        if query.get("watch") in ("true", "1"):
            return cls("watch", path, query)
        return cls("get" if _names_an_object(path) else "list", path, query)

    @property
    def namespace(self) -> str:
        """Namespace to which the path is limited; empty where it is not limited to one namespace."""
        found = re.search(r"/namespaces/([^/]+)/", self.path)
        return found[1] if found else ""


def _names_an_object(path: str) -> bool:
    parts = path.strip("/").split("/")
    # A path begins with /api/v1 or /apis/GROUP/VERSION. If the path is limited to a namespace, namespaces/NAME follows.
    # Then the plural of the resource follows and, if the path names one object, the name of the object.
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return len(rest) != 1


@dataclass(frozen=True, slots=True)
class Delay:
    """Fault: the request is forwarded ``seconds`` later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Fault: the proxy answers the request with an error, and does not forward the request."""

    status: int
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset:
    """Fault: a TCP reset. If ``carried_out``, the proxy forwards the request, and the reset replaces the API server's
    answer. Otherwise the proxy does not forward the request."""

    carried_out: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Fault: the request is neither forwarded nor answered."""


@dataclass(frozen=True, slots=True)
class ServeOld:
    """Fault: lists show the state at ``resource_version``, an older resourceVersion, and watches repeat all events
    since that version."""

    resource_version: str


@dataclass(frozen=True, slots=True)
class CutWatch:
    """Fault: a watch sends the first ``after_events`` events. When the next event arrives, the stream ends without this
    event and without an error."""

    after_events: int


@dataclass(frozen=True, slots=True)
class StreamError:
    """Fault: the stream of a watch consists of one ERROR event and ends."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class EditEvents:
    """Fault: each event of a watch is replaced by the events that ``edit`` returns for it."""

    edit: Callable[[Event], Sequence[Event]]


Fault = Delay | Answer | Reset | Drop | ServeOld | CutWatch | StreamError | EditEvents


@dataclass
class Rule:
    """Injects ``fault`` into matching requests. The first ``skip`` matching requests are left alone. The fault then
    applies to the next ``times`` matching requests or, if ``times`` is None, to all further ones."""

    fault: Fault
    verbs: frozenset[str] = frozenset()
    """Verbs to match, for example ``{"list", "watch"}``; empty matches every verb."""
    path: str = ""
    """Regular expression that must match somewhere in the path."""
    skip: int = 0
    times: int | None = None
    met: int = field(default=0, init=False)
    """Number of requests that matched so far."""
    applied: int = field(default=0, init=False)

    def takes(self, request: Request) -> bool:
        """Count ``request`` if it matches, and return whether the fault applies to ``request``."""
        if self.verbs and request.verb not in self.verbs:
            return False
        if not re.search(self.path, request.path):
            return False
        self.met += 1
        if self.met <= self.skip or (self.times is not None and self.applied >= self.times):
            return False
        self.applied += 1
        return True


def dropping(chosen: Callable[[int], bool]) -> Callable[[Event], Sequence[Event]]:
    """Return a function for `EditEvents` that drops chosen events.

    ``chosen`` gets the number of each event, counted from 1, and returns True for an event to drop.
    """
    number = 0

    def edit(event: Event) -> Sequence[Event]:
        nonlocal number
        number += 1
        return () if chosen(number) else (event,)

    return edit


def duplicating(event: Event) -> Sequence[Event]:
    """Return ``event`` twice. With this function in `EditEvents`, a watch sends every event twice."""
    return (event, event)


def swapping() -> Callable[[Event], Sequence[Event]]:
    """Return a function for `EditEvents` that swaps each pair of neighbouring events. Bookmarks belong to no pair, and
    are sent at once."""
    held: list[Event] = []

    def edit(event: Event) -> Sequence[Event]:
        if event["type"] == "BOOKMARK":
            return (event,)
        if held:
            return (event, held.pop())
        held.append(event)
        return ()

    return edit
