"""Classifies the texts with which CUDA, NCCL, the NVIDIA driver and torch report that a rank can't go on: lack of
memory, a fault of the node, a driver that is too old, a wrong set-up of the pod, a peer that left, or a crash.

Only the texts tell these errors apart, because torch raises nearly all of them as RuntimeError or DistBackendError. A
test looks for each text of `TEXTS` in the installed library that prints the text, so that an upgrade that changes a
text fails the test.

`worker.py` and `peer_errors.py` ask `diagnose` about the errors of torch, and `processes.py` asks `fault_of_signal`
about workers that left no outcome.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from finetune_trainer.pod.errors import one_line


class DeviceFault(StrEnum):
    """What a text says about its cause. The order of the members is the order of specificity: where the lines of a text
    name several faults, the first of these members counts.

    A fault of the hardware comes first, because it is a cause of all others. Lack of memory comes before a wrong
    set-up, and both come before a peer that left, because NCCL reports them with the same general sentence. The loss of
    a peer comes before a crash, because a crash is what is left.
    """

    NODE_FAULT = "NodeFault"
    """The GPU or the driver of the node is broken or not available. Another node may do the same work."""
    DRIVER_TOO_OLD = "DriverTooOld"
    """The driver of the node is too old for the image. No other attempt on such a node succeeds."""
    OUT_OF_MEMORY = "OutOfMemory"
    """The GPU, or the pod, has no memory left."""
    WRONG_SETUP = "WrongSetup"
    """Image, pod or network do not fit the GPUs, for example because /dev/shm is too small. A peer is not the cause."""
    PEER_LEFT = "PeerLeft"
    """Another rank ended or can't be reached. The cause is elsewhere."""
    CRASH = "Crash"
    """Anything else, such as an error of a kernel."""


class Source(StrEnum):
    """The program that prints a text."""

    CUDA = "CUDA runtime, cudaGetErrorString"
    CUDNN = "cuDNN, cudnnGetErrorString"
    NCCL = "NCCL, src/init.cc, src/include/alloc.h, src/misc and src/transport"
    OLDER_NCCL = "NCCL before 2.29, src/misc/socket.cc"
    TORCH_CUDA = "torch, c10/cuda/CUDAFunctions.cpp and CUDACachingAllocator.cpp"
    TORCH_CPU = "torch, c10/core/impl/alloc_cpu.cpp"
    TORCH_STATUS = "torch, aten/src/ATen/cuda/Exceptions.cpp and CUDABlas.cpp"
    TORCH_NCCL = "torch, torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp and NCCLUtils.cpp"
    TORCH_CPU_LIBRARY = "torch, torch/csrc/distributed/c10d/socket.cpp and Utils.hpp, and gloo/transport/tcp"
    DRIVER = "NVIDIA's driver, messages in the kernel's log and of NVML"
    SYSTEM = "the C library, strerror"


TEXTS: Mapping[DeviceFault, Mapping[Source, Sequence[str]]] = {
    DeviceFault.NODE_FAULT: {
        Source.CUDA: (
            "uncorrectable ECC error encountered",
            "uncorrectable NVLink error detected during the execution",
            "Invalid access of peer GPU memory over nvlink or a hardware error",
            "hardware stack error",
            "CUDA-capable device(s) is/are busy or unavailable",
            "exclusive-thread device already in use by a different thread",
            "no CUDA-capable device is detected",
            "system not yet initialized",
            "system has unsupported display driver / cuda driver combination",
            "driver shutting down",
            "CUDA driver is a stub library",
            "MPS client failed to connect to the MPS control daemon or the MPS server",
            "the MPS client has been terminated by the server",
        ),
        Source.TORCH_CUDA: (
            "Found no NVIDIA driver on your system",
            "No CUDA GPUs are available",
            "CUDA driver initialization failed",
            "CUDA unknown error - this may be due to an incorrectly set up environment",
        ),
        Source.DRIVER: (
            "GPU has fallen off the bus",
            "GPU is lost",
            "requires a reset before it can be used",
            "Driver/library version mismatch",
        ),
    },
    DeviceFault.DRIVER_TOO_OLD: {
        Source.CUDA: (
            "CUDA driver version is insufficient for CUDA runtime version",
            "API call is not supported in the installed CUDA driver",
            "forward compatibility was attempted on non supported HW",
            "the provided PTX was compiled with an unsupported toolchain",
        ),
        Source.TORCH_CUDA: ("The NVIDIA driver on your system is too old",),
    },
    DeviceFault.OUT_OF_MEMORY: {
        # The CUDA runtime has the same words for memory of the GPU and for pinned memory of the host.
        Source.CUDA: ("out of memory",),
        Source.TORCH_CUDA: ("CUDA out of memory",),
        Source.TORCH_CPU: ("DefaultCPUAllocator: can't allocate memory",),
        Source.TORCH_STATUS: ("CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
        Source.CUDNN: ("DEVICE_ALLOCATION_FAILED", "HOST_ALLOCATION_FAILED"),
        Source.NCCL: ("Failed to CUDA malloc", "Failed to CUDA calloc", "Failed to CUDA host alloc"),
    },
    DeviceFault.WRONG_SETUP: {
        Source.CUDA: ("no kernel image is available for execution on the device", "invalid device ordinal"),
        Source.NCCL: (
            "no socket interface found",
            "No usable listening interface found",
            "Duplicate GPU detected",
            # /dev/shm is full.
            "shared memory segment",
            "failed to extend",
            # Without the capability IPC_LOCK the limit of locked memory is low, and a NIC can register no memory.
            "Call to ibv_create_qp failed",
            "Call to ibv_create_cq failed",
            "Call to ibv_reg_mr",
            "NCCL version mismatch",
            "Attempted to connect incompatible devices",
            "unhandled system error (run with",
            "invalid usage (run with",
            "invalid argument (run with",
        ),
    },
    DeviceFault.PEER_LEFT: {
        Source.NCCL: ("remote process exited or there was a network error", "Got completion from peer"),
        Source.OLDER_NCCL: ("Connection closed by remote peer",),
        Source.TORCH_NCCL: (
            "ncclRemoteError: ",
            "Watchdog caught collective operation timeout",
            "NCCL communicator was aborted on rank",
        ),
        Source.TORCH_CPU_LIBRARY: (
            "Connection closed by peer",
            "Connection was likely closed",
            "Timed out waiting",
            "The client socket has failed to connect",
            "The client socket has timed out",
        ),
        Source.SYSTEM: ("Connection reset by peer", "Connection refused", "No route to host", "Broken pipe"),
    },
    DeviceFault.CRASH: {
        Source.CUDA: (
            "unspecified launch failure",
            "an illegal memory access was encountered",
            "device-side assert triggered",
            "misaligned address",
            "the launch timed out and was terminated",
        ),
        Source.TORCH_STATUS: ("CUBLAS_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
        Source.NCCL: ("unhandled cuda error (run with", "internal error - please report this issue"),
    },
}
"""The literal part of each known text, which is the same in every message, by fault and source. A line of a message
names the fault where it contains the literal, in upper or lower case."""

NODE_XIDS: Mapping[int, str] = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "failure to record a remapped row",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high single-bit ECC error rate",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "GSP RPC timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
    154: "GPU recovery action changed",
}
"""Xids, the numbers of the errors that the NVIDIA driver writes to the kernel's log, which say that the GPU, its memory
or its link is broken, with their names in NVIDIA's document "XID Errors" (docs.nvidia.com/deploy/xid-errors). Other
Xids, such as 13 and 31, mostly come from the program itself and count as a crash."""
_XID = re.compile(r"\bxid\b(?: \([^)]*\))?:? ?(\d{1,4})", re.IGNORECASE)
_LAST_ERROR = re.compile(r"^\s*(?:\[rank\d+\]:\s*)?Last error:\s*$", re.MULTILINE)
"""The line behind which torch prints NCCL's own text. Only that text names the cause of an NCCL error."""
_ORDER = tuple(DeviceFault)
_LITERALS = tuple(
    (fault, literal.lower())
    for fault, sources in TEXTS.items()
    for literals in sources.values()
    for literal in literals
)


@dataclass(frozen=True)
class Diagnosis:
    """What a text says."""

    fault: DeviceFault
    known: bool
    """Whether a text of `TEXTS` or an Xid names the fault. Where nothing names it, the fault is CRASH."""
    cause: str
    """The text as one line for a message, which contains the line that names the fault."""


def diagnose(text: str, *, limit: int = 300) -> Diagnosis:
    """Return what ``text``, the message of an error, says about its cause. Any text has a diagnosis.

    Each line is judged by itself. Of the faults that the lines name, the most specific one counts (see `DeviceFault`).
    The cause has at most ``limit`` characters.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marks = [mark for line in lines for mark in _marks(line)]
    last = _LAST_ERROR.search(text)
    behind = [part.strip() for part in text[last.end() :].splitlines() if part.strip()][:1] if last else []
    if not marks:
        return Diagnosis(DeviceFault.CRASH, known=False, cause=_joined(lines[:1], behind, limit))
    mark = min(marks, key=lambda mark: _ORDER.index(mark.fault))
    # A line may be longer than the whole cause. What stands before the text that names the fault is then left out.
    named = mark.line if mark.end <= limit // 2 else mark.line[mark.start :]
    return Diagnosis(mark.fault, known=True, cause=_joined(lines[:1], [named, *behind], limit))


def fault_of_signal(number: int, *, ranks: int) -> DeviceFault:
    """Return the fault of a worker process of a training with ``ranks`` ranks, which computes on a GPU, was ended by
    the signal ``number`` and left no outcome.

    NCCL's watchdog thread in torch ends the process with SIGABRT after the loss of a peer, so that no Python code runs.
    A single rank has no peer. The kernel sends SIGBUS when a process writes to a full /dev/shm.
    """
    if number == signal.SIGABRT and ranks > 1:
        return DeviceFault.PEER_LEFT
    return DeviceFault.WRONG_SETUP if number == signal.SIGBUS else DeviceFault.CRASH


class _Mark(NamedTuple):
    """A text in a line that names a fault."""

    fault: DeviceFault
    line: str
    start: int
    end: int


def _marks(line: str) -> Iterator[_Mark]:
    """Yield the texts in ``line`` that name a fault."""
    lower = line.lower()
    for fault, literal in _LITERALS:
        start = lower.find(literal)
        if start >= 0:
            yield _Mark(fault, line, start, start + len(literal))
    for xid in _XID.finditer(line):
        fault = DeviceFault.NODE_FAULT if int(xid[1]) in NODE_XIDS else DeviceFault.CRASH
        yield _Mark(fault, line, *xid.span())


def _joined(first: Sequence[str], causes: Sequence[str], limit: int) -> str:
    """Return the first line of a text and the lines that hold its cause as one line of at most ``limit`` characters.
    Where they are too long, the first line is cut first."""
    different = dict.fromkeys(causes)
    parts = [one_line(line, limit=limit // len(different)) for line in different]
    cause = ": ".join(part for part in parts if part)[:limit]
    start = one_line("".join(first))
    if not cause or not start or start in parts:
        return (cause or start or "no message")[:limit]
    room = limit - len(cause) - len(": ")
    return f"{start[:room]}: {cause}" if room > 0 else cause
