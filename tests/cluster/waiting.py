"""Wait until a condition holds, with a time limit. When the time is up, the error says what was waited for, and shows
for example the end of a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOG_TAIL_LINES = 25


class ClusterError(RuntimeError):
    """A part of the cluster failed. The message tells a person all that is known about it."""


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    timeout: float,
    *,
    evidence: Callable[[], str] | None = None,
    interval: float = 0.05,
) -> T:
    """Call ``condition`` again and again until its result is truthy, and return the result.

    ``what`` completes the sentence "waited N s for ..." of the error. If ``evidence`` is given, it is called when the
    time is up, and its result becomes part of the error's message. ``condition`` may raise ``ClusterError`` if further
    waiting is useless.

    Raises:
        ClusterError: ``condition`` had no truthy result within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            reason = f"\n{evidence()}" if evidence else ""
            raise ClusterError(f"waited {timeout:g} s for {what}{reason}")
        # This is only the pause between two calls of `condition`. The deadline above bounds the whole wait.
        time.sleep(interval)


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the path of a log file and its last lines, as text for an error message."""
    if not log.exists():
        return f"--- {log}: does not exist"
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64 * 1024))
        text = file.read().decode(errors="replace")
    return "\n".join([f"--- the end of {log}", *text.splitlines()[-lines:]])
