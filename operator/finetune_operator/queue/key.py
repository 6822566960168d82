"""The key of a job, which names the job in the work queue and in the memory of the operator."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from finetune_core.api.job import NAME_MAX_LENGTH, NAME_PATTERN, NAMESPACE_PATTERN


class _NamespaceAndName(NamedTuple):
    namespace: str
    name: str


_NAMESPACE = re.compile(NAMESPACE_PATTERN)
_NAME = re.compile(NAME_PATTERN)


class Key(_NamespaceAndName):
    """Namespace and name of a FineTuneJob, for example ``Key("team-a", "viggo-7b")``.

    No key exists with a namespace or a name that the API server would refuse. Keys become parts of request paths, log
    lines and Prometheus labels, and some come from clients that nobody has authenticated yet.
    """

    __slots__ = ()

    def __new__(cls, namespace: str, name: str) -> Self:
        """Return the key; raise ValueError where the API server accepts no such namespace or job."""
        # `fullmatch` is needed, because the `$` of a pattern also matches before a line feed at the end.
        if not (_NAMESPACE.fullmatch(namespace) and _NAME.fullmatch(name) and len(name) <= NAME_MAX_LENGTH):
            raise ValueError("namespace and name must be those of a possible FineTuneJob")
        return super().__new__(cls, namespace, name)

    @classmethod
    def parse(cls, namespace: str, name: str) -> Self | None:
        """Return the key of ``namespace`` and ``name``, or None where no job can have them."""
        try:
            return cls(namespace, name)
        except ValueError:
            return None

    def __str__(self) -> str:
        """Return `namespace/name`."""
        return f"{self.namespace}/{self.name}"
