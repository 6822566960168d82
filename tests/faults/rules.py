"""What the proxy does to which request: a rule chooses requests by verb, path and number, its fault says what
happens to them. Faults are values; `proxy` carries them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
"""One line of a watch: `type` and `object`."""

WRITES = frozenset({"create", "update", "patch", "delete"})
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the API server's audit log would name it."""

    verb: str
    path: str
    query: Mapping[str, str]

    @classmethod
    def of(cls, method: str, path: str, query: Mapping[str, str]) -> Request:
        """Name the request; a GET of a collection is a list, or a watch."""
        if method != "GET":
            return cls(_VERBS[method], path, query)
        if query.get("watch") in ("true", "1"):
            return cls("watch", path, query)
        return cls("get" if _names_an_object(path) else "list", path, query)

    @property
    def namespace(self) -> str:
        """Namespace in the path; empty where it names none."""
        found = re.search(r"/namespaces/([^/]+)/", self.path)
        return found[1] if found else ""


def _names_an_object(path: str) -> bool:
    parts = path.strip("/").split("/")
    # /api/v1/... or /apis/group/version/...; then optionally namespaces/NAME; then plural, and a name.
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return len(rest) != 1


@dataclass(frozen=True, slots=True)
class Delay:
    """Pass the request on after some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer in the API server's stead; the request never reaches it."""

    status: int
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection: before the server saw the request, or after it carried it out."""

    carried_out: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Never answer; the request does not reach the server."""


@dataclass(frozen=True, slots=True)
class ServeOld:
    """Lists show the state at an older resourceVersion; watches begin there and replay what came after."""

    resource_version: str


@dataclass(frozen=True, slots=True)
class CutWatch:
    """End the stream of a watch after some events, without a word."""

    after_events: int


@dataclass(frozen=True, slots=True)
class StreamError:
    """Send an ERROR event in the stream of a watch and end it."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class EditEvents:
    """Change the events of a watch: each event is replaced by what ``edit`` returns for it."""

    edit: Callable[[Event], Sequence[Event]]


Fault = Delay | Answer | Reset | Drop | ServeOld | CutWatch | StreamError | EditEvents


@dataclass
class Rule:
    """Applies ``fault`` to the requests that match, after the first ``skip`` of them, ``times`` times."""

    fault: Fault
    verbs: frozenset[str] = frozenset()
    """Empty: all."""
    path: str = ""
    """Regular expression, searched in the path."""
    skip: int = 0
    times: int | None = None
    met: int = field(default=0, init=False)
    """Requests that matched so far."""
    applied: int = field(default=0, init=False)

    def takes(self, request: Request) -> bool:
        """Count the request, and tell whether the fault happens to it."""
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
    """Return an edit that loses the events whose number, from 1, is chosen."""
    number = 0

    def edit(event: Event) -> Sequence[Event]:
        nonlocal number
        number += 1
        return () if chosen(number) else (event,)

    return edit


def duplicating(event: Event) -> Sequence[Event]:
    """Send every event twice."""
    return (event, event)


def swapping() -> Callable[[Event], Sequence[Event]]:
    """Return an edit that holds every second event back until after the next one. Bookmarks stay where they are."""
    held: list[Event] = []

    def edit(event: Event) -> Sequence[Event]:
        if event["type"] == "BOOKMARK":
            return (event,)
        if held:
            return (event, held.pop())
        held.append(event)
        return ()

    return edit
