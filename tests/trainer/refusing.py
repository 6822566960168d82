"""Makes the kernel refuse one system call of this process from now on, with a given error (seccomp). So a test can see
what happens on a disk that fails, or on a file system that can't do something."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
"""Arguments of `prctl`, as in Linux' `prctl.h` and `seccomp.h`."""
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NUMBERS = {
    "x86_64": {"write": 1, "fsync": 74, "linkat": 265, "read": 0, "mkdirat": 258, "unlinkat": 263},
    "aarch64": {"write": 64, "fsync": 82, "linkat": 37, "read": 63, "mkdirat": 34, "unlinkat": 35},
}
"""Numbers of system calls, by the kind of processor."""


def refuse(call: str, error: int) -> None:
    """Let each system call ``call`` of this process fail with the number ``error``, such as `errno.EIO`. This can't be
    undone."""
    program = [
        (LOAD_WORD, 0, 0, 0),  # the number of the call is the first word of what a filter can read
        (JUMP_IF_EQUAL, 0, 1, NUMBERS[platform.machine()][call]),
        (RETURN, 0, 0, REFUSE | error),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filters = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SET_SECCOMP, FILTER, ctypes.addressof(filters), 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl")
