"""The signals that ask a pod to stop, and a flag that records them. The launcher and every worker process create one
`StopFlag` at their start.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Becomes true when this process receives SIGTERM or SIGINT. The main thread checks the flag between two pieces of
    work, because a signal handler should do no work of its own."""

    def __init__(self) -> None:
        """Install the signal handlers and unblock the signals. A signal that arrived while the signals were blocked is
        delivered now, so none is lost.
        """
        self._is_set = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _set(self, *_: object) -> None:
        self._is_set = True

    def __call__(self) -> bool:
        """Return whether this process has received SIGTERM or SIGINT."""
        return self._is_set
