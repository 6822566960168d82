"""The name of a job in the work queue and in the memory of the operator."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """Namespace and name of a FineTuneJob, for example ``Key("team-a", "viggo-7b")``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        """Return `namespace/name`."""
        return f"{self.namespace}/{self.name}"
