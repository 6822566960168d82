"""What the check prints: lines of figures, of expectations, and of the ends of sections, each as one JSON object.

Sections write lines through `Check`. The process of a section (`section_process.py`) sends the lines to `runner.py`,
which prints them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

READY = "ready"
"""What the process of a section sends instead of a JSON object once the section's module is imported."""
Figure = Any
"""A figure of a line: a number, a text, a bool, None, or a list or mapping of these."""


class End(StrEnum):
    """How a section ended."""

    DONE = "done"
    RAISED = "raised"
    """An exception ended the section."""
    CUT = "cut"
    """The section took longer than its bound."""
    DIED = "died"
    """The process of the section ended."""
    SKIPPED = "skipped"
    """Too little time was left."""


@dataclass(frozen=True)
class Figures:
    """Measured figures of one case of a section, by name."""

    section: str
    case: str
    values: Mapping[str, Figure]


@dataclass(frozen=True)
class Expectation:
    """Whether something that a section expects holds, with the figures that show it."""

    section: str
    what: str
    holds: bool
    values: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class SectionEnd:
    """How and when a section ended."""

    section: str
    how: End
    seconds: float
    """Time of the section without imports."""
    import_seconds: float = 0.0
    problem: str = ""
    """Why the section did not end by itself; empty where `how` is DONE."""
    trace: str = ""
    left_gib: float = 0.0
    """GPU memory in GiB that the section's process still holds."""


Line = Figures | Expectation | SectionEnd
KINDS: Mapping[str, type[Line]] = {"figures": Figures, "expectation": Expectation, "end": SectionEnd}


def to_json(line: Line, at: float) -> str:
    """Return ``line`` as a JSON object in one line. ``at`` is the number of seconds since the check began."""
    kind = next(name for name, type_ in KINDS.items() if isinstance(line, type_))
    return json.dumps({"at": round(at, 1), "kind": kind, **_plain(asdict(line))}, allow_nan=False)


def from_json(text: str) -> Line:
    """Return the line that `to_json` wrote."""
    values = json.loads(text)
    values.pop("at")
    kind = KINDS[values.pop("kind")]
    if kind is SectionEnd:
        values["how"] = End(values["how"])
    return kind(**values)


def _plain(value: Any) -> Any:
    """Return ``value`` with a text in place of each number that JSON does not have, and of each unknown object."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


@dataclass(frozen=True)
class Check:
    """What a section gets: whether the run is dry, and where to write lines."""

    section: str
    dry: bool
    """Whether a tiny model is computed on the CPU."""
    write: Callable[[Line], None]

    def say(self, case: str, **values: Figure) -> None:
        """Write the figures of ``case``."""
        self.write(Figures(self.section, case, values))

    def expect(self, what: str, holds: bool, **values: Figure) -> None:
        """Write whether ``what`` holds. An expectation that does not hold counts in the exit status, and the section
        goes on."""
        self.write(Expectation(self.section, what, bool(holds), values))
