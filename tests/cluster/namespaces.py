"""Start programs in the network, mount and PID namespaces of a cluster, and move threads of this process into the
network namespace of a cluster."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespaces:
    """The network, mount and PID namespaces of the process ``pid``, for example of the first process of a cluster."""

    pid: int

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return a command that runs ``argv`` inside the network, mount and PID namespaces. The program never outlives
        the cluster, because the kernel kills all processes of a PID namespace when the first process of the namespace
        ends."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *argv]

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Move the calling thread into the network namespace during the block. Threads and programs that start during
        the block are inside too, and stay inside after the block."""
        with (
            Path("/proc/thread-self/ns/net").open("rb") as before,
            Path(f"/proc/{self.pid}/ns/net").open("rb") as inside,
        ):
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"entering the cluster's network namespace: {os.strerror(error)}")


def die_with_parent(signal_number: int) -> None:
    """Tell the kernel to send ``signal_number`` to this process when its parent process ends."""
    if _libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def children(pid: int) -> list[int]:
    """Return the ids of all child processes of the process ``pid``, without those that have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # In /proc/PID/stat, the state and the parent's id follow the program's name. The line is split after the
            # last parenthesis, because the name is in parentheses and may contain any characters.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has ended since the folder was listed.
        if int(parent) == pid and state != "Z":
            found.append(int(entry.name))
    return found
