"""Sections about the machine: what it is, how fast its parts are at best, and whether a rank can join."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from finetune_core.planning.flops import peak_flops
from tests.gpu.models import gpu_name, joined_gang
from tests.gpu.report import Check
from tests.gpu.training import synchronize

GIB = 2**30
LIBRARIES = ("transformers", "peft", "deepspeed", "pydantic")
WARM_UP, REPEATS = 3, 10


def machine(check: Check) -> None:
    """Write what the machine is, and its peaks."""
    device = torch.device("cpu") if check.dry else torch.device("cuda", 0)
    check.say(
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=_driver(),
        **{name: _version(name) for name in LIBRARIES},
    )
    check.say("host", cores=os.cpu_count(), memory_gib=round(_host_bytes() / GIB, 1))
    if not check.dry:
        visible = torch.cuda.is_available()
        check.expect("the driver shows a GPU", visible, cuda=torch.version.cuda, driver=_driver())
        if not visible:
            return
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        known = torch.cuda.get_arch_list()
        check.say(
            "GPU",
            gpu=name,
            capability=".".join(map(str, capability)),
            memory_gib=round(torch.cuda.get_device_properties(device).total_memory / GIB, 1),
            free_gib=round(torch.cuda.mem_get_info(device)[0] / GIB, 1),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
            data_sheet_tflops=(peak_flops(name) or 0) / 1e12 or None,
        )
        check.expect("the GPU computes in bf16", torch.cuda.is_bf16_supported(including_emulation=False), gpu=name)
        # A kernel runs on all newer GPUs of the same generation.
        fits = any(entry.startswith(f"sm_{capability[0]}") for entry in known)
        check.expect("torch has kernels for this GPU", fits, gpu=name, kernels=known)
    _peaks(check, device)


def _peaks(check: Check, device: torch.device) -> None:
    """Write how fast matrix products, elementwise work and copies are."""
    size = 256 if check.dry else 8192
    dtype = torch.float32 if check.dry else torch.bfloat16
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matrix = _seconds(lambda: one @ other, device)
    thin = torch.randn(size, 8, device=device, dtype=dtype)
    narrow = _seconds(lambda: one @ thin, device)
    values = torch.ones((1 << 16) if check.dry else (1 << 30), device=device)
    elementwise = _seconds(lambda: values.mul_(1.0), device)
    check.say(
        "peaks",
        matrix_tflops=2 * size**3 / matrix / 1e12,
        thin_product_us=narrow * 1e6,
        elementwise_tb_per_second=2 * values.nbytes / elementwise / 1e12,
    )
    part = values[: (1 << 14) if check.dry else (1 << 28)]
    pageable = torch.empty_like(part, device="cpu")
    copied = {"pageable": _seconds(lambda: pageable.copy_(part), device, repeats=2)}
    if device.type == "cuda":
        pinned = torch.empty_like(part, device="cpu", pin_memory=True)
        copied["pinned"] = _seconds(lambda: pinned.copy_(part), device, repeats=2)
    check.say(
        "copies to the host", **{f"{kind}_gb_per_second": part.nbytes / each / 1e9 for kind, each in copied.items()}
    )
    check.expect("a copy to the host holds what was copied", bool((pageable == 1).all()))


def _seconds(work: Callable[[], object], device: torch.device, *, repeats: int = REPEATS) -> float:
    """Return the mean seconds of ``work`` after a warm-up."""
    for _ in range(min(WARM_UP, repeats)):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None where `nvidia-smi` is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or None


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def join(check: Check) -> None:
    """Join as the only rank, and add up numbers over the ranks."""
    began = time.perf_counter()
    gang = joined_gang(dry=check.dry)
    seconds = time.perf_counter() - began
    backend = dist.get_backend()
    check.expect("the ranks talk through NCCL on a GPU, and through gloo on a CPU", backend == _backend(gang.device))
    began, agreements = time.perf_counter(), 100
    for _ in range(agreements):
        gang.check_stop()
    agreement = (time.perf_counter() - began) / agreements
    values = torch.arange(1000, dtype=torch.float32, device=gang.device)
    dist.all_reduce(values)
    total = float(values.sum())
    check.expect("the sum over the ranks is right", total == 999 * 1000 / 2 * gang.world_size, total=total)
    check.say("join", seconds=seconds, backend=backend, agreement_us=agreement * 1e6, gpu=gpu_name(gang.device))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
