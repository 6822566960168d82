"""What is wrong with a job: where, what it must be, and who refuses it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FieldPath = tuple[str | int, ...]
"""Keys and list indices from the root of the object."""


class Refusal(StrEnum):
    """Who refuses a job."""

    SERVER = "server"
    """The API server: `kubectl apply` fails."""
    OPERATOR = "operator"
    """The operator: the job ends with `Accepted=False`, `Stalled=True`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: FieldPath
    message: str
    refused_by: Refusal = Refusal.SERVER

    def __str__(self) -> str:
        """Return `spec.lora.rank: must be between 1 and 512`."""
        return f"{dotted(self.path)}: {self.message}"


def dotted(path: FieldPath) -> str:
    """Return ``path`` as the API server writes it: `spec.podTemplate.env[0].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "<root>"
