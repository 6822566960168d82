"""Entering a cluster's network, mount and PID namespaces, as a program or as one thread of this process."""

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
    """The namespaces of the process ``pid``, the first process of a cluster."""

    pid: int

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` inside all three; it ends with the cluster, whoever started it."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *argv]

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Put the calling thread, and the threads and programs it starts meanwhile, into the network namespace."""
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
    """Ask the kernel to send this process ``signal_number`` when its parent ends."""
    if _libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def children(pid: int) -> list[int]:
    """Return the process ids of the living children of ``pid``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name, in parentheses, may hold anything; after it come the state and the parent.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(parent) == pid and state != "Z":
            found.append(int(entry.name))
    return found
