"""Reads the container's CPU limit, memory limit and number of out-of-memory kills from its cgroup (version 2 or 1), and
the CPU request from the environment. `launcher.py` calls these functions, `node_examples.py` chooses the number of its
processes with them, and `ranks/memory.py` names the memory limit in a message.

Outside a container the cgroup's files may be absent. Then there is no limit, and the number of kills is 0.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from finetune_core.contract.pod import CPU_REQUEST_VARIABLE
from finetune_core.errors import UserError

ROOT = Path("/sys/fs/cgroup")


def parse_cpu_max(text: str) -> float | None:
    """Return the number of CPUs in the text of cgroup v2's `cpu.max`: 2.0 for "200000 100000", None for "max"."""
    quota, period = text.split()
    return None if quota == "max" else int(quota) / int(period)


def parse_oom_kills(text: str) -> int:
    """Return the value of `oom_kill` in the text of `memory.events` (v2) or `memory.oom_control` (v1), or 0 where the
    text has no such value."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return 0


def _first_text(*paths: Path) -> str | None:
    for path in paths:
        if path.is_file():
            return path.read_text()
    return None


def cpu_limit(root: Path = ROOT) -> float | None:
    """Return the container's CPU limit as a number of CPUs, or None without a limit."""
    text = _first_text(root / "cpu.max")
    if text is not None:
        return parse_cpu_max(text)
    for folder in (root / "cpu", root / "cpu,cpuacct"):
        quota = _first_text(folder / "cpu.cfs_quota_us")
        period = _first_text(folder / "cpu.cfs_period_us")
        if quota is not None and period is not None and int(quota) > 0:
            return int(quota) / int(period)
    return None


def oom_kills(root: Path = ROOT) -> int:
    """Return how many processes of the container the kernel has killed so far for lack of memory."""
    text = _first_text(root / "memory.events", root / "memory" / "memory.oom_control")
    return parse_oom_kills(text) if text is not None else 0


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the container's memory limit in bytes, or None without a limit."""
    text = _first_text(root / "memory.max", root / "memory" / "memory.limit_in_bytes")
    if text is None or text.strip() == "max":
        return None
    # cgroup v1 has no word for "no limit". The file then holds the largest possible number of bytes in whole pages.
    return int(text) if int(text) < 1 << 60 else None


def threads_per_process(processes: int, *, limit: float | None, request: float | None, cores: int) -> int:
    """Return how many compute threads each worker process of the pod should use, at least 1. ``processes`` is the
    number of worker processes, ``limit`` and ``request`` are the container's CPU limit and CPU request, None for none,
    and ``cores`` is the number of CPU cores that the container may use.

    The kernel would throttle threads beyond the CPU limit, and threads beyond the request would run only where no other
    pod needs the CPUs. The results of CPU computations also depend on the number of threads, so the number must not
    grow with the node.
    """
    return max(1, math.floor(available_cpus(limit=limit, request=request, cores=cores) / processes))


def available_cpus(*, limit: float | None, request: float | None, cores: int) -> float:
    """Return how many CPUs the container should use at once: the least of its CPU ``limit``, its CPU ``request`` (None
    for none) and the number of CPU ``cores`` that it may use."""
    return min(amount for amount in (limit, request, cores) if amount is not None)


def cpu_request(environment: Mapping[str, str]) -> float | None:
    """Return the container's CPU request as a number of CPUs, or None where ``environment`` has none. Raises UserError
    where the environment variable is no whole number."""
    text = environment.get(CPU_REQUEST_VARIABLE)
    if text is None:
        return None
    if re.fullmatch("[0-9]{1,10}", text) is None:
        raise UserError(f"environment variable {CPU_REQUEST_VARIABLE}", "must be a whole number (the kubelet sets it)")
    return int(text) / 1000


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))
