"""Which jobs a command is about: one namespace or all, names, and labels.

The commands make a `Selection` from the command line, and `job_client.py` and `following.py` ask the API server for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Key(NamedTuple):
    """Namespace and name of a job."""

    namespace: str
    name: str


def key_of(stored: Mapping[str, Any]) -> Key:
    """Return the namespace and the name of ``stored``, an object as the API server returned it."""
    return Key(stored["metadata"].get("namespace") or "default", stored["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class Selection:
    """The jobs that a command is about."""

    namespace: str | None
    """None stands for all namespaces."""
    names: tuple[str, ...] = ()
    """Empty: all jobs of the namespace."""
    labels: str | None = None
    """A label selector, as that of `kubectl get -l`."""

    @property
    def fields(self) -> str | None:
        """The field selector of the request: one name can be selected by the API server, several can't."""
        return f"metadata.name={self.names[0]}" if len(self.names) == 1 else None

    def has(self, stored: Mapping[str, Any]) -> bool:
        """Return whether ``stored``, a job that the API server sent, is one of the named jobs."""
        return not self.names or stored["metadata"]["name"] in self.names

    @property
    def place(self) -> str:
        """Where the jobs are, in words: `namespace research`."""
        return "any namespace" if self.namespace is None else f"namespace {self.namespace}"
