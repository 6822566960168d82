"""Runs a function in a child process, and sees or ends the child at each of its system calls. The kernel reports the
calls (ptrace), so nothing in the child is replaced.

A caller must be a process with a single thread, such as `storing.py`, because the child is a fork.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from typing import NamedTuple

TRACE_ME, SYSCALL, SET_OPTIONS, SYSCALL_INFO = 0, 24, 0x4200, 0x420E
"""Requests to ptrace, as in Linux' `ptrace.h`."""
MARK_SYSCALLS, END_WITH_TRACER = 1, 0x100000
ENTERED = 1
"""What `SYSCALL_INFO` says of a child that has asked for a system call which the kernel has not begun."""
CALLS = {
    "x86_64": {1: "write", 74: "fsync", 83: "mkdir", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat"},
    "aarch64": {64: "write", 82: "fsync", 34: "mkdirat", 35: "unlinkat", 38: "renameat", 37: "linkat", 276: "renameat"},
}
"""Numbers of the system calls that change files, by the kind of processor."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Call(NamedTuple):
    """A system call: its name, and its first argument, which is a file descriptor for many calls."""

    name: str
    first: int


class Traced(NamedTuple):
    """What a child did."""

    calls: list[Call]
    """Its system calls that `CALLS` names, in their order."""
    is_killed: bool


def traced(work: Callable[[], object], *, kill_at: int | None = None) -> Traced:
    """Run ``work`` in a child. Kill the child just before the kernel begins its system call number ``kill_at``, counted
    from 0 over all calls. Without ``kill_at``, or if there are fewer calls, the child runs to its end."""
    child = os.fork()
    if child == 0:
        try:
            _ptrace(TRACE_ME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    _ptrace(SET_OPTIONS, child, data=MARK_SYSCALLS | END_WITH_TRACER)
    names, count = CALLS.get(platform.machine(), {}), 0
    calls: list[Call] = []
    while True:
        _ptrace(SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if status != 0:
                raise RuntimeError(f"the traced work ended with status {status}")
            return Traced(calls, is_killed=False)
        entered, number, first = _syscall(child)
        if not entered:
            continue
        if count == kill_at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Traced(calls, is_killed=True)
        count += 1
        if number in names:
            calls.append(Call(names[number], first))


def _syscall(child: int) -> tuple[bool, int, int]:
    """Return whether the stopped child has just asked for a system call, the number of the call, and its first
    argument."""
    info = ctypes.create_string_buffer(96)
    _ptrace(SYSCALL_INFO, child, len(info), ctypes.addressof(info))
    return (info.raw[0] == ENTERED, *struct.unpack_from("<qq", info.raw, 24))


def _ptrace(request: int, process: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, process, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace {request}")
