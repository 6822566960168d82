"""The signals that ask a pod to stop (SIGTERM and SIGINT), and a flag that remembers whether one has arrived. The
launcher and every worker process create one `StopFlag` at their start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PIPE_BYTES = 1 << 16
"""Capacity of a pipe of Linux in bytes."""
PR_SET_PDEATHSIG = 1
"""Option of `prctl(2)` that sets which signal the kernel sends to this process when its parent ends."""


def end_with_parent(parent: int) -> None:
    """Let the kernel send SIGTERM to this process when the process with id ``parent`` ends, for whatever reason.

    In a container every process ends with PID 1. Outside of a container, workers call this, and the launcher of
    `finetune run`: a worker whose launcher was killed would otherwise train on unnoticed, and keep the devices that the
    next attempt needs.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # The parent ended before `prctl`, so the kernel will send no signal for its end.
        os.kill(os.getpid(), signal.SIGTERM)


class StopFlag:
    """Remembers whether this process has received SIGTERM or SIGINT. The program asks the flag between two pieces of
    work, because a signal handler should do no work of its own. Any thread may ask.

    Python runs a signal handler only when the main thread is back from its call. While the main thread waits for a GPU,
    other threads have to know of the signal. So Python's own handler in C, which runs at once, writes the number of the
    signal into a pipe, and the flag reads the pipe.
    """

    def __init__(self) -> None:
        """Install the signal handlers and unblock the signals. A signal that arrived while it was blocked is delivered
        now, so no signal is lost."""
        self._is_set = False
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        self._reader: int | None = reader
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_pipe)
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _set(self, *_: object) -> None:
        self._is_set = True

    def __call__(self) -> bool:
        """Return whether this process has received SIGTERM or SIGINT."""
        if not self._is_set and self._reader is not None:
            with contextlib.suppress(BlockingIOError):
                if any(number in STOP_SIGNALS for number in os.read(self._reader, PIPE_BYTES)):
                    self._is_set = True
        return self._is_set

    def _leave_pipe(self) -> None:
        """Leave the pipe to the parent process. Otherwise a signal that only the forked process receives would be taken
        for one of its parent."""
        signal.set_wakeup_fd(-1)
        self._reader = None
