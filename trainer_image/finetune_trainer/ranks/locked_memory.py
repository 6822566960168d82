"""Lets this process lock as much memory as its pod may. `worker.py` calls `lock_all_memory` at its start.

A network device for RDMA reads and writes memory by itself, so NCCL registers its buffers with the device, and the
kernel locks registered memory. How much a process may lock is its limit RLIMIT_MEMLOCK, unless it has the capability
IPC_LOCK.

A job asks for the capability in `podTemplate.securityContext`. That alone gives the capability to processes of root
only. The kernel gives it to the trainer's user where the file of the program carries it too (`man 7 capabilities`,
"Transformation of capabilities during execve()"): `gpu.Dockerfile` marks the interpreter. The mark must be without the
effective flag. With the flag the interpreter would not start in pods without the capability, such as that of the
preflight check. So each process has to make the capability effective.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

CAP_IPC_LOCK = 14
"""Number of the capability in linux/capability.h."""
_VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3: sets of 64 bits, as two words each."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def lock_all_memory() -> bool:
    """Raise the limit of locked memory as far as this process may, and make the capability IPC_LOCK effective where the
    process is permitted to have it. Return whether the process has the capability.

    The kernel has capabilities for each thread, and a new thread takes those of its creator. So the main thread must
    call this function before it starts others.
    """
    if sys.platform != "linux":
        return False
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = _Header(_VERSION, 0), (_Words * 2)()
    if libc.capget(ctypes.byref(header), words) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    bit = 1 << CAP_IPC_LOCK
    if not words[0].permitted & bit:
        return False
    words[0].effective |= bit
    if libc.capset(ctypes.byref(header), words) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
