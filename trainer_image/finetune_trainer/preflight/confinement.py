"""Runs checks in a child process that may not use more memory than the pod has to spare. `entrypoint.py` calls
`run_confined`.

Model and data come from anywhere, and a small file may expand to gigabytes. Without the child process the kernel would
kill the whole pod for lack of memory. Then nobody would learn which file was at fault, and the operator would start the
pod again and again.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

MEMORY_BYTES = 512 << 20
"""Largest memory in bytes that the child may add to what it shares with the parent at the fork. The preflight pod may
use 1 GiB, of which the rest is for the memory of the parent and for `EXCESS_BYTES`."""
EXCESS_BYTES = 192 << 20
"""Memory in bytes that the child may take beyond its limit before the parent looks at the child's memory the next time.
On a busy machine the parent may look late. So the kernel refuses memory beyond the limit plus this excess
(RLIMIT_DATA)."""
LOOK_SECONDS = 0.01
"""Time in seconds between two looks at the memory of the child. The kernel gives a process about a gigabyte in a
second."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_DONE = 93
"""Exit code of a child that has done its work. The code is not 0, because code of a user, such as an own grader, may
end the child with 0 before the work is done."""
_MEMORY_REFUSED = 2
"""Exit code of a child to which the kernel has refused memory."""


class ChildEnd(Enum):
    """How the child process ended."""

    DONE = "The child has done its work."
    FAILED = "The child raised an exception and has printed its traceback."
    KILLED = "A signal ended the child, sent by the kernel, by a library or by somebody else."
    TOO_LARGE = "The child added more memory than it may, or the kernel refused it more memory."


def run_confined(
    work: Callable[[Callable[[Any], None]], None],
    receive: Callable[[Any], None],
    *,
    memory_bytes: int = MEMORY_BYTES,
) -> ChildEnd:
    """Call ``work`` in a forked child process, and return how the child ended.

    ``work`` gets a function that sends a JSON value to this process. This process calls ``receive`` with each value.
    The child is killed when it has added more than ``memory_bytes`` to the memory that it had at the fork. The child is
    also killed when an exception is raised in this process, for example at the end of a time limit.

    The kernel refuses memory to the child from `EXCESS_BYTES` above ``memory_bytes`` on. A child that ends with a
    MemoryError counts as too large. A child that ends by another error, such as the abort of a library, counts as too
    large if it has added more than ``memory_bytes``.

    No other thread may run in this process, because a forked child has only the calling thread.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(work, writer, memory_bytes)
    os.close(writer)
    watched = _Watched(memory_bytes)
    closed = False
    try:
        closed = _receive_all(reader, receive, child, watched)
    finally:
        # Until this process has waited for the child, the process id still belongs to the child, even if the child has
        # ended.
        if not closed:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _DONE:
        return ChildEnd.DONE
    refused = os.WIFEXITED(status) and os.WEXITSTATUS(status) == _MEMORY_REFUSED
    if not closed or refused or watched.is_too_large(usage.ru_maxrss << 10):
        return ChildEnd.TOO_LARGE
    return ChildEnd.KILLED if os.WIFSIGNALED(status) else ChildEnd.FAILED


@dataclass
class _Watched:
    """What the parent knows about the memory of its child."""

    memory_bytes: int
    """Memory in bytes that the child may add to ``at_the_fork``."""
    at_the_fork: int | None = None
    """Resident memory in bytes of the child at the fork, including the pages that the child shares with the parent.
    None until the child has sent the number."""

    def is_too_large(self, resident: int) -> bool:
        """Return whether a child with ``resident`` bytes of memory has added more than it may."""
        return self.at_the_fork is not None and resident - self.at_the_fork > self.memory_bytes


def _run_child(work: Callable[[Callable[[Any], None]], None], writer: int, memory_bytes: int) -> None:
    """Call ``work`` in the child, and end the child without the cleanup at the exit of Python. The child is a copy of
    the parent, so the cleanup would be that of the parent."""
    code = 1
    try:
        stream = os.fdopen(writer, "w")

        def send(value: Any) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        send(_resident_bytes(os.getpid()))
        most = _data_bytes() + memory_bytes + EXCESS_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        work(send)
        code = _DONE
    except MemoryError:
        traceback.print_exc()
        code = _MEMORY_REFUSED
    except BaseException:  # noqa: BLE001  (the child ends here, whatever happened)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # The stream stays open until the process ends. The end of the stream shows the parent that the child has ended.
        os._exit(code)


def _receive_all(reader: int, receive: Callable[[Any], None], child: int, watched: _Watched) -> bool:
    """Call ``receive`` with each value that the child sends, until the child has closed its end of the pipe, and return
    True. Return False at once when the child is too large.

    The first value is not passed to ``receive``, because it is the memory of the child at the fork.
    """
    told = b""
    looked_at = 0.0
    while True:
        ready, _, _ = select.select([reader], [], [], LOOK_SECONDS)
        if ready:
            piece = os.read(reader, 65536)
            if not piece:
                return True
            told += piece
            *lines, told = told.split(b"\n")
            for line in lines:
                if watched.at_the_fork is None:
                    watched.at_the_fork = int(line)
                else:
                    receive(json.loads(line))
        if time.monotonic() - looked_at >= LOOK_SECONDS:
            looked_at = time.monotonic()
            if watched.is_too_large(_resident_bytes(child)):
                return False


def _resident_bytes(process: int) -> int:
    """Return the resident memory in bytes of the process with the id ``process``: 0 for a child that has ended but was
    not waited for yet."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_BYTES


def _data_bytes() -> int:
    """Return the size in bytes of this process's address space for data, which RLIMIT_DATA limits (man 2 setrlimit)."""
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(r"^VmData:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10
