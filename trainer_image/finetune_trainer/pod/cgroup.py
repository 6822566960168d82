"""What the container's cgroup says: CPU limit and number of kills for lack of memory; version 2 and version 1.

Called by the launcher. Absent files mean no limit and no kills (a process outside any container).
"""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def parse_cpu_max(text: str) -> float | None:
    """Return the CPUs of cgroup v2's `cpu.max` ("200000 100000" is 2.0), None for "max"."""
    quota, period = text.split()
    return None if quota == "max" else int(quota) / int(period)


def parse_oom_kills(text: str) -> int:
    """Return `oom_kill` of `memory.events` (v2) or `memory.oom_control` (v1)."""
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
    """Return the container's CPU limit, None without one."""
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
    """Return how many processes of the container were killed for lack of memory so far."""
    text = _first_text(root / "memory.events", root / "memory" / "memory.oom_control")
    return parse_oom_kills(text) if text is not None else 0


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the container's memory limit in bytes, None without one."""
    text = _first_text(root / "memory.max", root / "memory" / "memory.limit_in_bytes")
    if text is None or text.strip() == "max":
        return None
    # Version 1 writes "no limit" as the largest number of whole pages.
    return int(text) if int(text) < 1 << 60 else None


def threads_per_process(processes: int, *, limit: float | None, cores: int) -> int:
    """Return the threads that each of ``processes`` computes with.

    More threads than the CPU limit are throttled, and the results of CPU kernels depend on the number: it
    follows from the pod's limit and not from the machine that the pod happens to be on.
    """
    available = cores if limit is None else min(cores, limit)
    return max(1, math.floor(available / processes))


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0))
