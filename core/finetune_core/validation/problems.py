"""The class for a problem that makes a job invalid: the path of the field, what is wrong with the field, and which
component refuses the job."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

FieldPath = tuple[str | int, ...]
"""Keys and list indices from the root of the object, for example `("spec", "podTemplate", "env", 0, "name")`."""


class Refusal(StrEnum):
    """The component that refuses a job because of a problem."""

    SERVER = "server"
    """The API server refuses the job: `kubectl apply` fails."""
    OPERATOR = "operator"
    """The operator refuses the job: the job ends with `Accepted=False` and `Stalled=True`."""
    CHECK = "check"
    """The preflight check before the first attempt refuses the job: the job ends with `Succeeded=False` before it gets
    GPUs."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with one field of a job. ``message`` says what the field must be, or that there is no such field."""

    path: FieldPath
    message: str
    refused_by: Refusal = Refusal.SERVER

    def __str__(self) -> str:
        """Return the problem as a line, for example `spec.lora.rank: must be between 1 and 512`."""
        return f"{dotted(self.path)}: {self.message}"


LOCAL_FILE = "file"
"""Field of a source that only `finetune run` reads: a path of its machine. The schema has no such field, because no pod
could read the path."""


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return the message about a field that does not exist. ``known`` are the fields that exist beside it: the message
    names the one with a similar name, or else all of them."""
    fields = list(known)
    if name == LOCAL_FILE and "volume" in fields:
        return f"is a path of one machine, and only `finetune run` reads it; must be one of {', '.join(fields)}"
    if close := difflib.get_close_matches(name, fields, n=1):
        return f"unknown field; did you mean `{close[0]}`?"
    return f"unknown field; must be one of {', '.join(fields)}" if fields else "unknown field"


def dotted(path: FieldPath) -> str:
    """Return ``path`` in the API server's notation, for example `spec.podTemplate.env[0].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "<root>"
