"""The signals that ask a pod to stop (SIGTERM and SIGINT), and a flag that remembers whether one has arrived. The
launcher and every worker process create one `StopFlag` at their start.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Remembers whether this process has received SIGTERM or SIGINT. The program asks the flag between two pieces of
    work, because a signal handler should do no work of its own."""

    def __init__(self) -> None:
        """Install the signal handlers and unblock the signals. A signal that arrived while it was blocked is delivered
        now, so no signal is lost."""
        self._is_set = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _set(self, *_: object) -> None:
        self._is_set = True

    def __call__(self) -> bool:
        """Return whether this process has received SIGTERM or SIGINT."""
        return self._is_set
