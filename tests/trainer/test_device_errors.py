"""Every known text of CUDA, NCCL, torch and the NVIDIA driver is classified, the installed libraries print the texts,
and any other text is classified too."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_core.api.resources import Device
from finetune_core.contract import Identity, RunConfig
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import NodeFault, OutOfMemory, OutsideFailure, PeerLost
from finetune_trainer.pod.outcomes import WorkerStatus, outcome_of
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.ranks.device_errors import NODE_XIDS, TEXTS, DeviceFault, Source, diagnose, fault_of_signal
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.peer_errors import peer_lost, torch_message
from finetune_trainer.worker import _classified_errors
from tests.trainer.pods import run_config

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:133, "
CUDA_CALL = f"""{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.7
ncclUnhandledCudaError: Call to CUDA function failed."""
SYSTEM_CALL = f"""{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.7
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. """
USAGE = f"""{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29.7
ncclInvalidUsage: This usually reflects invalid usage of NCCL library."""
SEARCH = "\nSearch for `cudaError' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html"
LAST = "\nLast error:\n"
EXAMPLES: Mapping[str, str] = {
    "Found no NVIDIA driver on your system": "Found no NVIDIA driver on your system. Please check that you have an"
    " NVIDIA GPU and installed a driver from http://www.nvidia.com/Download/index.aspx",
    "No CUDA GPUs are available": "No CUDA GPUs are available",
    "CUDA driver initialization failed": "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "CUDA unknown error - this may be due to an incorrectly set up environment": "CUDA unknown error - this may be due"
    " to an incorrectly set up environment, e.g. changing env variable CUDA_VISIBLE_DEVICES after program start.",
    "GPU has fallen off the bus": "NVRM: Xid (PCI:0000:06:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off"
    " the bus.",
    "GPU is lost": "Unable to determine the device handle for GPU 0000:0B:00.0: GPU is lost.  Reboot the system to"
    " recover this GPU",
    "requires a reset before it can be used": "The GPU requires a reset before it can be used again",
    "Driver/library version mismatch": "Failed to initialize NVML: Driver/library version mismatch",
    "The NVIDIA driver on your system is too old": "The NVIDIA driver on your system is too old (found version 12080)."
    " Please update your GPU driver by downloading and installing a new version from the URL:"
    " http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to install a PyTorch version"
    " that has been compiled with your version of the CUDA driver.",
    "CUDA out of memory": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of"
    " which 1.04 GiB is free. Including non-PyTorch memory, this process has 78.10 GiB memory in use.",
    "out of memory": f"{CUDA_CALL}{LAST}Cuda failure 2 'out of memory'",
    "DefaultCPUAllocator: can't allocate memory": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator:"
    " can't allocate memory: you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)",
    "CUBLAS_STATUS_ALLOC_FAILED": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUSOLVER_STATUS_ALLOC_FAILED": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"
    " `cusolverDnCreate(handle)`",
    "DEVICE_ALLOCATION_FAILED": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "HOST_ALLOCATION_FAILED": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Failed to CUDA malloc": f"{CUDA_CALL}{LAST}Failed to CUDA malloc 4194304 bytes",
    "Failed to CUDA calloc": f"{CUDA_CALL}{LAST}Failed to CUDA calloc async 4 bytes",
    "Failed to CUDA host alloc": f"{CUDA_CALL}{LAST}Failed to CUDA host alloc 65536 bytes",
    "no socket interface found": f"{SYSTEM_CALL}{LAST}Bootstrap : no socket interface found",
    "No usable listening interface found": f"{SYSTEM_CALL}{LAST}NET/Socket : No usable listening interface found",
    "Duplicate GPU detected": f"{USAGE}{LAST}Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
    "shared memory segment": f"{SYSTEM_CALL}{LAST}Error while creating shared memory segment /dev/shm/nccl-VPyhzw"
    " (size 21823872), error: No space left on device (28)",
    "failed to extend": f"{SYSTEM_CALL}{LAST}Error: failed to extend /dev/shm/nccl-UbzKZ9 to 9637892 bytes, error: No"
    " space left on device (28)",
    "Call to ibv_create_qp failed": f"{SYSTEM_CALL}{LAST}Call to ibv_create_qp failed with error Cannot allocate"
    " memory",
    "Call to ibv_create_cq failed": f"{SYSTEM_CALL}{LAST}Call to ibv_create_cq failed with error Cannot allocate"
    " memory",
    "Call to ibv_reg_mr": f"{SYSTEM_CALL}{LAST}Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory",
    "NCCL version mismatch": f"{SYSTEM_CALL}{LAST}NCCL version mismatch with remote peer 10.0.0.4<43816> (local: 5,"
    " remote 6)",
    "Attempted to connect incompatible devices": f"{USAGE}{LAST}NET/IB : Attempted to connect incompatible devices:"
    " [0]mlx5_0:1/IB and [1]mlx5_1:1/RoCE. Try selecting NICs of only one link type using NCCL_IB_HCA",
    "unhandled system error (run with": SYSTEM_CALL,
    "invalid usage (run with": USAGE,
    "invalid argument (run with": f"{NCCL}invalid argument (run with NCCL_DEBUG=WARN for details)",
    "remote process exited or there was a network error": f"{NCCL}remote process exited or there was a network error,"
    " NCCL version 2.29.7\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    " prematurely.",
    "Got completion from peer": f"{NCCL}remote process exited or there was a network error{LAST}NET/IB: Got completion"
    " from peer 10.0.0.4<4791> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=IBV_WC_SEND(0) vendor_err=129 hca mlx5_0",
    "Connection closed by remote peer": f"{NCCL}remote process exited or there was a network error{LAST}socketProgress:"
    " Connection closed by remote peer ip-10-0-0-4<43816>",
    "ncclRemoteError: ": "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    " prematurely.",
    "Watchdog caught collective operation timeout": "[Rank 1] Watchdog caught collective operation timeout:"
    " WorkNCCL(SeqNum=78, OpType=BROADCAST, NumelIn=80, NumelOut=80, Timeout(ms)=600000) ran for 600096 milliseconds"
    " before timing out.",
    "NCCL communicator was aborted on rank": "NCCL communicator was aborted on rank 3. ",
    "Connection closed by peer": "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    " [127.0.0.1]:20113",
    "Connection was likely closed": "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server"
    " shutdown or crash?",
    "Timed out waiting": "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 300000ms for"
    " recv operation to complete",
    "The client socket has failed to connect": "The client socket has failed to connect to any network address of"
    " (10.0.0.4, 23456).",
    "The client socket has timed out": "The client socket has timed out after 300000ms while trying to connect to"
    " (10.0.0.4, 23456).",
    "Connection reset by peer": f"{NCCL}remote process exited or there was a network error{LAST}"
    "ncclOsSocketProgressOpt: Call to recv from 10.0.0.4<51013> failed : Connection reset by peer",
    "Connection refused": f"{NCCL}remote process exited or there was a network error{LAST}ncclOsSocketPollConnect to"
    " 10.0.0.4<51013> failed with error Connection refused",
    "No route to host": f"{NCCL}remote process exited or there was a network error{LAST}ncclOsSocketPollConnect to"
    " 10.0.0.4<51013> failed with error No route to host",
    "Broken pipe": "[../third_party/gloo/gloo/transport/tcp/pair.cc:368] writev [127.0.0.1]:32001: Broken pipe",
    "CUBLAS_STATUS_EXECUTION_FAILED": "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle)`",
    "CUBLAS_STATUS_NOT_INITIALIZED": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "unhandled cuda error (run with": CUDA_CALL,
    "internal error - please report this issue": f"{NCCL}internal error - please report this issue to the NCCL"
    " developers",
}
"""A whole message for each text of `TEXTS`, as torch raises it or as the driver prints it. The messages of the CUDA
runtime, which all have the same form, are made by `message_of`."""


def known_texts() -> Iterator[tuple[DeviceFault, Source, str]]:
    for fault, sources in TEXTS.items():
        for source, literals in sources.items():
            for literal in literals:
                yield fault, source, literal


def message_of(literal: str, source: Source) -> str:
    """Return a whole message that contains ``literal``. torch's c10/cuda/CUDAException.cpp words all errors of the CUDA
    runtime in the same way."""
    if source is Source.CUDA and literal not in EXAMPLES:
        return f"CUDA error: {literal}{SEARCH}"
    return EXAMPLES[literal]


@pytest.mark.parametrize(("fault", "source", "literal"), list(known_texts()))
def test_each_known_text_is_classified(fault: DeviceFault, source: Source, literal: str) -> None:
    message = message_of(literal, source)
    assert literal.strip().lower() in message.lower()
    found = diagnose(message)
    assert (found.fault, found.known) == (fault, True)
    assert literal.strip().lower() in found.cause.lower()


def test_no_example_is_left_without_its_text() -> None:
    assert EXAMPLES.keys() <= {literal for _, _, literal in known_texts()}


# ---- The installed libraries print these texts ----


def package(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def library(source: Source) -> Path | None:
    """Return the installed library that prints the texts of ``source``, None where it is not part of the image."""
    nvidia, torch_libraries = package("nvidia"), package("torch") / "lib"
    return {
        Source.CUDA: nvidia / "cu13/lib/libcudart.so.13",
        Source.CUDNN: nvidia / "cudnn/lib/libcudnn_graph.so.9",
        Source.NCCL: nvidia / "nccl/lib/libnccl.so.2",
        Source.TORCH_CUDA: torch_libraries / "libc10_cuda.so",
        Source.TORCH_CPU: torch_libraries / "libc10.so",
        Source.TORCH_STATUS: torch_libraries / "libtorch_cuda.so",
        Source.TORCH_NCCL: torch_libraries / "libtorch_cuda.so",
        Source.TORCH_CPU_LIBRARY: torch_libraries / "libtorch_cpu.so",
    }.get(source)


@cache
def literals_in(path: Path) -> frozenset[str]:
    """Return the texts of `TEXTS` that the file contains. The file is read in pieces, because it has up to 500 MB."""
    wanted = {literal for _, source, literal in known_texts() if library(source) == path}
    found: set[str] = set()
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(32 << 20):
            window = tail + piece
            found |= {literal for literal in wanted - found if literal.encode() in window}
            tail = window[-200:]
    return frozenset(found)


@pytest.mark.parametrize("source", [source for source in Source if library(source) is not None])
def test_the_installed_library_prints_the_texts(source: Source) -> None:
    path = library(source)
    assert path is not None
    literals = {literal for _, from_, literal in known_texts() if from_ is source}
    assert literals <= literals_in(path)


def test_the_c_library_prints_the_texts() -> None:
    libc = ctypes.CDLL(None)
    libc.strerror.restype = ctypes.c_char_p
    printed = {libc.strerror(number).decode() for number in range(140)}
    assert {literal for _, source, literal in known_texts() if source is Source.SYSTEM} <= printed


def test_each_error_of_the_cuda_runtime_has_a_class() -> None:
    """An error that `TEXTS` does not name is a crash. The list says which errors `TEXTS` names, so that an upgrade of
    CUDA can't change the text of one of them unseen."""
    path = library(Source.CUDA)
    runtime = ctypes.CDLL(str(path))
    runtime.cudaGetErrorString.restype = runtime.cudaGetErrorName.restype = ctypes.c_char_p
    named = {
        runtime.cudaGetErrorName(number).decode(): diagnose(
            f"CUDA error: {runtime.cudaGetErrorString(number).decode()}{SEARCH}"
        ).fault
        for number in range(1, 1000)
        if runtime.cudaGetErrorName(number) != b"unrecognized error code"
    }
    by_fault = {fault: {name for name, each in named.items() if each is fault} for fault in DeviceFault}
    assert by_fault[DeviceFault.OUT_OF_MEMORY] == {"cudaErrorMemoryAllocation"}
    assert by_fault[DeviceFault.DRIVER_TOO_OLD] == {
        "cudaErrorInsufficientDriver",
        "cudaErrorCallRequiresNewerDriver",
        "cudaErrorCompatNotSupportedOnDevice",
        "cudaErrorUnsupportedPtxVersion",
    }
    assert by_fault[DeviceFault.WRONG_SETUP] == {"cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDevice"}
    assert by_fault[DeviceFault.PEER_LEFT] == set()
    assert by_fault[DeviceFault.NODE_FAULT] == {
        "cudaErrorECCUncorrectable",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorContained",
        "cudaErrorHardwareStackError",
        "cudaErrorDevicesUnavailable",
        "cudaErrorDeviceAlreadyInUse",
        "cudaErrorNoDevice",
        "cudaErrorSystemNotReady",
        "cudaErrorSystemDriverMismatch",
        "cudaErrorCudartUnloading",
        "cudaErrorStubLibrary",
        "cudaErrorMpsConnectionFailed",
        "cudaErrorMpsClientTerminated",
    }


# ---- Order and any text ----


def test_the_order_of_specificity_is_that_of_the_members() -> None:
    """For each pair of neighbours, the text of the first one wins wherever it stands."""
    texts = {fault: next(iter(next(iter(sources.values())))) for fault, sources in TEXTS.items()}
    for first, second in pairwise(DeviceFault):
        assert diagnose(f"{texts[second]}\n{texts[first]}").fault is first
        assert diagnose(f"{texts[first]}\n{texts[second]}").fault is first


@pytest.mark.parametrize(("number", "name"), NODE_XIDS.items())
def test_an_xid_of_the_hardware_is_a_fault_of_the_node(number: int, name: str) -> None:
    found = diagnose(f"NVRM: Xid (PCI:0000:06:00): {number}, pid=1234, {name}")
    assert found.fault is DeviceFault.NODE_FAULT


@pytest.mark.parametrize("number", [13, 31, 43, 45, 7, 9999])
def test_another_xid_is_a_crash(number: int) -> None:
    assert diagnose(f"NVRM: Xid (PCI:0000:06:00): {number}, pid=1234").fault is DeviceFault.CRASH


def test_a_launch_failure_is_a_fault_of_the_node_only_after_the_hardware_reported_one() -> None:
    launch = f"CUDA error: unspecified launch failure{SEARCH}"
    assert diagnose(launch).fault is DeviceFault.CRASH
    assert diagnose(f"{launch}\nNVRM: Xid (PCI:0000:06:00): 79, pid=1").fault is DeviceFault.NODE_FAULT


ANY_LINE = st.one_of(st.text(), st.sampled_from([literal for _, _, literal in known_texts()]))


@given(st.lists(ANY_LINE).map("\n".join), st.integers(20, 400))
@example("Last error:", 20)
@example("", 20)
@example("\ud800 Xid (\u0661): \u0663", 20)
def test_any_text_has_a_class_and_a_cause_of_bounded_length(text: str, limit: int) -> None:
    found = diagnose(text, limit=limit)
    assert found.fault in DeviceFault
    assert 0 < len(found.cause) <= limit
    assert "\n" not in found.cause
    found.cause.encode()
    assert found.known or found.fault is DeviceFault.CRASH


@given(st.lists(ANY_LINE, min_size=1))
def test_a_text_has_the_most_specific_class_of_its_lines(lines: list[str]) -> None:
    order = list(DeviceFault)
    wanted = min((diagnose(line).fault for line in lines), key=order.index)
    assert diagnose("\n".join(lines)).fault is wanted


@given(st.text("abc ", max_size=1000), st.sampled_from([literal for _, _, literal in known_texts()]))
def test_the_text_that_names_the_fault_is_never_cut_away(before: str, literal: str) -> None:
    assert literal.strip().lower() in diagnose(f"{before} {literal}", limit=200).cause.lower()


@pytest.mark.parametrize(
    ("number", "ranks", "fault"),
    [
        (signal.SIGABRT, 2, DeviceFault.PEER_LEFT),
        (signal.SIGABRT, 1, DeviceFault.CRASH),
        (signal.SIGBUS, 1, DeviceFault.WRONG_SETUP),
        (signal.SIGBUS, 2, DeviceFault.WRONG_SETUP),
        (signal.SIGSEGV, 2, DeviceFault.CRASH),
    ],
)
def test_a_signal_that_leaves_no_outcome_has_a_fault(number: int, ranks: int, fault: DeviceFault) -> None:
    assert fault_of_signal(number, ranks=ranks) is fault


# ---- What the product makes of the texts ----

OUT_OF_MEMORY_IN_NCCL = f"{CUDA_CALL}{LAST}Cuda failure 2 'out of memory'"
MORE: Mapping[str, DeviceFault] = {
    OUT_OF_MEMORY_IN_NCCL: DeviceFault.OUT_OF_MEMORY,
    f"{CUDA_CALL}{LAST}Cuda failure 214 'uncorrectable ECC error encountered'": DeviceFault.NODE_FAULT,
    CUDA_CALL: DeviceFault.CRASH,
    f"CUDA error: uncorrectable ECC error encountered{SEARCH}": DeviceFault.NODE_FAULT,
    f"CUDA error: out of memory{SEARCH}": DeviceFault.OUT_OF_MEMORY,
    f"CUDA error: an illegal memory access was encountered{SEARCH}": DeviceFault.CRASH,
    "Expected all tensors to be on the same device": DeviceFault.CRASH,
    "gloo: an error that no table knows": DeviceFault.CRASH,
}
TOLD: Mapping[str, DeviceFault] = {text: diagnose(text).fault for text in [*EXAMPLES.values(), *MORE]}
ENDS: Mapping[DeviceFault, type[Exception]] = {
    DeviceFault.NODE_FAULT: NodeFault,
    DeviceFault.DRIVER_TOO_OLD: UserError,
    DeviceFault.OUT_OF_MEMORY: OutOfMemory,
    DeviceFault.WRONG_SETUP: OutsideFailure,
    DeviceFault.PEER_LEFT: PeerLost,
}


class Nowhere:
    endpoint = "http://127.0.0.1:1"


def plan_of(device: Device) -> WorkerPlan:
    config = run_config(Nowhere(), "errors", world__device=device)  # type: ignore[arg-type]
    nowhere = Path("/nonexistent")
    return WorkerPlan(
        paths=Paths(),
        identity=Identity(namespace="default", name="t", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(config),
        inputs=Inputs(model=nowhere, train=nowhere),
        folder=nowhere,
    )


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError])
@pytest.mark.parametrize("text", TOLD)
def test_an_error_ends_a_worker_on_gpus_as_its_text_says(text: str, kind: type[RuntimeError]) -> None:
    """A text that no table knows is a lost peer where torch raises it for a collective, and else a crash."""
    diagnosis = diagnose(text)
    assert diagnosis.fault is TOLD[text]
    is_lost = not diagnosis.known and (kind is not RuntimeError or "gloo" in text)
    expected = PeerLost if is_lost else ENDS.get(diagnosis.fault, kind)
    with pytest.raises(expected) as raised, _classified_errors(plan_of("GPU"), WorkerStatus(step=12)):
        raise kind(text)
    assert type(raised.value) is expected
    if diagnosis.known and expected not in (OutOfMemory, kind):
        assert diagnosis.cause in str(raised.value)
    outcome = outcome_of(raised.value)
    assert bool(outcome.result.node_fault) is (diagnosis.fault is DeviceFault.NODE_FAULT)
    assert outcome.caused_by_peer is (expected is PeerLost)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("text", TOLD)
def test_a_fault_of_this_pod_is_no_lost_peer_while_the_ranks_meet(
    text: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several ranks NCCL connects when the process group is made. There is no GPU here, so a function that raises
    the error takes the place of torch's."""

    def fails(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistBackendError(text)

    gang = Gang.__new__(Gang)
    gang.device, gang.rank, gang.world_size = torch.device(device), 0, 2
    monkeypatch.setattr(gang, "_open_store", torch.distributed.HashStore)
    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    is_of_peer = device == "cpu" or TOLD[text] in (DeviceFault.PEER_LEFT, DeviceFault.CRASH)
    with pytest.raises(PeerLost if is_of_peer else torch.distributed.DistBackendError):
        gang._join(timedelta(seconds=1))


@pytest.mark.parametrize("text", [text for text in TOLD if TOLD[text] is not DeviceFault.OUT_OF_MEMORY])
def test_on_cpus_only_a_lost_peer_is_read_from_the_text(text: str) -> None:
    is_lost = TOLD[text] is DeviceFault.PEER_LEFT or text.startswith("gloo")
    expected = PeerLost if is_lost else RuntimeError
    with pytest.raises(expected) as raised, _classified_errors(plan_of("CPU"), WorkerStatus(step=12)):
        raise RuntimeError(text)
    assert type(raised.value) is expected


def test_the_line_behind_last_error_is_kept() -> None:
    error = torch.distributed.DistBackendError(EXAMPLES["No route to host"])
    assert "No route to host" not in torch_message(error)
    assert str(peer_lost(error)).endswith("to 10.0.0.4<51013> failed with error No route to host")
