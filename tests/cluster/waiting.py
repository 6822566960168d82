"""Wait for a condition with a time limit. When the time is up, the error says what was waited for and shows the end of
a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOG_TAIL_LINES = 25


class ClusterError(RuntimeError):
    """A part of the cluster failed. The message is complete and written for a person."""


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    timeout: float,
    *,
    evidence: Callable[[], str] | None = None,
    interval: float = 0.05,
) -> T:
    """Call ``condition`` until its result is truthy, and return the result.

    ``what`` completes the sentence "waited N s for ...". ``evidence`` is called when the time is up, and its result
    becomes part of the message. ``condition`` may raise ``ClusterError`` when further waiting is useless.

    Raises:
        ClusterError: ``condition`` did not become truthy within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            reason = f"\n{evidence()}" if evidence else ""
            raise ClusterError(f"waited {timeout:g} s for {what}{reason}")
        # The pause is the interval between two calls of `condition`. The deadline bounds the whole wait.
        time.sleep(interval)


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log file below a line with the file's path."""
    if not log.exists():
        return f"--- {log}: does not exist"
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64 * 1024))
        text = file.read().decode(errors="replace")
    return "\n".join([f"--- the end of {log}", *text.splitlines()[-lines:]])
