"""Bounded waiting: every wait of the cluster says what it waited for and shows the end of the log that tells why it
did not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOG_TAIL_LINES = 25


class ClusterError(RuntimeError):
    """Something about the cluster did not work; the message is meant for a person and complete."""


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    timeout: float,
    *,
    evidence: Callable[[], str] | None = None,
    interval: float = 0.05,
) -> T:
    """Return the first truthy value of ``condition``.

    ``what`` completes the sentence "waited N s for ...". ``evidence`` is asked for the reason once the time is up.
    ``condition`` may raise ``ClusterError`` to give up early, when it is clear that waiting on is useless.

    Raises:
        ClusterError: after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            reason = f"\n{evidence()}" if evidence else ""
            raise ClusterError(f"waited {timeout:g} s for {what}{reason}")
        # The interval between two looks; the deadline bounds them all.
        time.sleep(interval)


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log file, headed by its path."""
    if not log.exists():
        return f"--- {log}: does not exist"
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64 * 1024))
        text = file.read().decode(errors="replace")
    return "\n".join([f"--- the end of {log}", *text.splitlines()[-lines:]])
