"""Runs checks in a child process that may not use more memory than the pod has to spare. `entrypoint.py` calls
`run_confined`.

Model and data come from anywhere, and a small file may expand to gigabytes. Without the child process the kernel would
kill the whole pod for lack of memory. Then nobody would learn which file was at fault, and the operator would start the
pod again and again.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

MEMORY_BYTES = 640 << 20
"""Largest memory in bytes that the child may add to what it shares with the parent at the fork. The preflight pod may
use 1 GiB. The rest is for the parent (60 MiB), and for what the child takes between two looks of the parent at the
child's memory."""
LOOK_SECONDS = 0.01
"""Time in seconds between two looks at the memory of the child. The kernel hands out about a gigabyte in a second."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ChildEnd(Enum):
    """How the child process ended."""

    DONE = "The child has done its work."
    FAILED = "The child raised an exception and has printed its traceback."
    KILLED = "A signal ended the child, sent by the kernel, by a library or by somebody else."
    TOO_LARGE = "The parent has killed the child, because it added more memory than it may."


def run_confined(
    work: Callable[[Callable[[Any], None]], None],
    receive: Callable[[Any], None],
    *,
    memory_bytes: int = MEMORY_BYTES,
) -> ChildEnd:
    """Call ``work`` in a forked child process, and return how the child ended.

    ``work`` gets a function that sends a JSON value to this process, where ``receive`` is called with it. The child is
    killed when it has added more than ``memory_bytes`` to the memory that it had at the fork, and when an exception is
    raised in this process, such as the end of a time limit. No other thread may run in this process, because a forked
    child has only the calling thread.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(work, writer)
    os.close(writer)
    try:
        too_large = _receive_all(reader, receive, child, memory_bytes)
        if too_large:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reader)
    if too_large:
        return ChildEnd.TOO_LARGE
    if os.WIFSIGNALED(status):
        return ChildEnd.KILLED
    return ChildEnd.DONE if os.WEXITSTATUS(status) == 0 else ChildEnd.FAILED


def _run_child(work: Callable[[Callable[[Any], None]], None], writer: int) -> None:
    """Call ``work`` in the child, and end the child without the cleanup at the exit of Python. The child is a copy of
    the parent, so the cleanup would be that of the parent."""
    code = 1
    try:
        stream = os.fdopen(writer, "w")

        def send(value: Any) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        # Pages that the child shares with the parent count as its own, so the parent needs the number from before.
        send(_resident_bytes(os.getpid()))
        work(send)
        code = 0
    except BaseException:  # noqa: BLE001  (the child ends here, whatever happened)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # The stream stays open until the process ends, because its end tells the parent that the child has ended.
        os._exit(code)


def _receive_all(reader: int, receive: Callable[[Any], None], child: int, memory_bytes: int) -> bool:
    """Receive values until the child has closed its end. Return early, with True, once the child is too large.

    The first value is not passed on: it is the memory of the child at the fork.
    """
    told = b""
    looked_at = 0.0
    at_the_fork: int | None = None
    while True:
        ready, _, _ = select.select([reader], [], [], LOOK_SECONDS)
        if ready:
            piece = os.read(reader, 65536)
            if not piece:
                return False
            told += piece
            *lines, told = told.split(b"\n")
            for line in lines:
                if at_the_fork is None:
                    at_the_fork = int(line)
                else:
                    receive(json.loads(line))
        if at_the_fork is not None and time.monotonic() - looked_at >= LOOK_SECONDS:
            looked_at = time.monotonic()
            if _resident_bytes(child) - at_the_fork > memory_bytes:
                return True


def _resident_bytes(process: int) -> int:
    """Return the resident memory of ``process`` in bytes. It is 0 for a child that has ended but was not waited for
    yet."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_BYTES
