"""A process that is forked from this one and that answers questions over a connection. `data/prepared/chunk_workers.py`
does work in such processes. `data/chat/template_process.py` has a process of this kind in code of its own, and calls
`set_patience`.

A forked process has everything in memory already that this process has, so that it is there in milliseconds. It uses
nothing of this process that another thread may hold, and ends without Python's cleanup, which would clean up what
belongs to this process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


class ForkedProcess:
    """A forked process, and this process's end of the connection to it."""

    def __init__(
        self, answer: Callable[[Connection], None], *, patience: float, not_for_it: Sequence[Connection] = ()
    ) -> None:
        """Fork this process. ``answer`` is called in the new process with its end of the connection, and the process
        ends when ``answer`` returns or raises. ``patience`` is the longest time in seconds that a question may take to
        be sent, and the longest pause within an answer. ``not_for_it`` are connections of this process that the new
        process must not hold open. The process is killed when the thread that called this ends. Raises OSError if no
        process can be started."""
        self.connection, answering = multiprocessing.Pipe()
        """Sending and receiving raise BlockingIOError once the process has stood still for the patience."""
        set_patience(self.connection, patience)
        self._parent = os.getpid()
        self._status: int | None = None
        self.id = os.fork()
        """The id of the process."""
        if self.id == 0:
            for connection in (self.connection, *not_for_it):
                connection.close()
            _run(answer, answering, self._parent)
        answering.close()

    @property
    def is_of_this_process(self) -> bool:
        """Whether this process has forked the process. False in a process that was forked later, which must neither ask
        nor end it."""
        return self._parent == os.getpid()

    def end(self, seconds: float = 0.0) -> int:
        """End the process if it still runs, and return its status (man 2 wait). ``seconds`` is the time that it gets to
        end by itself."""
        if self._status is None and self.is_of_this_process:
            if seconds:
                self._wait(seconds)
            ended, self._status = os.waitpid(self.id, os.WNOHANG)
            if not ended:
                # The signal does not change the status of a process that is ending by itself. The connection is closed
                # afterwards, because a process that reads from it would end by itself too.
                os.kill(self.id, signal.SIGKILL)
                _, self._status = os.waitpid(self.id, 0)
            self.connection.close()
        return self._status or 0

    def _wait(self, seconds: float) -> None:
        """Wait until the process has ended, for ``seconds`` at most."""
        try:
            process = os.pidfd_open(self.id)
        except OSError:
            # This process has no file descriptor left, or Linux is older than 5.3 (man 2 pidfd_open). A process that
            # ends closes its end of the connection.
            self.connection.poll(seconds)
            return
        try:
            wait([process], seconds)
        finally:
            os.close(process)


def set_patience(connection: Connection, seconds: float) -> None:
    """Let reading and writing on this end of a pair of sockets fail with EAGAIN after ``seconds`` (man 7 socket)."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, value)


def _run(answer: Callable[[Connection], None], asked: Connection, parent: int) -> NoReturn:
    try:
        _end_with(parent)
        # The first process only notes a SIGTERM, and its handlers were inherited. It also ends this process itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        # A search for garbage among the objects of the first process would copy their memory.
        gc.freeze()
        answer(asked)
    finally:
        os._exit(0)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the thread that forked it ends, for whatever reason (man 2 prctl)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
