"""Create and remove a cgroup folder for each cluster, in every cgroup hierarchy (version 1 or 2) of the machine.

The kubelet puts the cgroups of all pods below the folder (``cgroupRoot``). Clusters therefore don't share cgroups, and
removing one folder is enough at the end.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.cluster.waiting import wait_for

REMOVAL_TIMEOUT_SECONDS = 10


def hierarchies() -> list[Path]:
    """Return the mount points of the cgroup file systems."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] in {"cgroup", "cgroup2"}]


def create(name: str) -> None:
    """Create the cgroup folder ``name`` in every hierarchy, with all CPUs and all controllers usable below the folder.

    ``name`` may be a path whose parent folder was created by an earlier call.
    """
    for hierarchy in hierarchies():
        root, own = (hierarchy / name).parent, Path(name).name
        controllers = root / "cgroup.controllers"
        if controllers.exists():
            wanted = " ".join(f"+{controller}" for controller in controllers.read_text().split())
            if wanted:
                (root / "cgroup.subtree_control").write_text(wanted)
        folder = root / own
        folder.mkdir(exist_ok=True)
        # In version 1 a new cpuset has no CPUs and no memory nodes, and a process can't join such a cpuset.
        for setting in ("cpuset.cpus", "cpuset.mems"):
            file = folder / setting
            if file.exists() and not controllers.exists():
                file.write_text((root / setting).read_text())


def remove(name: str) -> None:
    """Remove the folder ``name`` and all folders below from every hierarchy. All processes in the folders must have
    ended."""
    for root in hierarchies():
        folder = root / name
        wait_for(f"the cgroup {folder} to be empty", partial(_removed, folder), REMOVAL_TIMEOUT_SECONDS)


def processes(name: str) -> set[int]:
    """Return the ids, in the machine's PID namespace, of all processes in the folder ``name`` and below."""
    found: set[int] = set()
    for folder in existing(name):
        for inner in _bottom_up(folder):
            # A folder that is removed during the loop has no processes.
            with contextlib.suppress(FileNotFoundError):
                found |= {int(line) for line in (inner / "cgroup.procs").read_text().split()}
    return found


def existing(name: str) -> list[Path]:
    """Return the cgroup folders called ``name`` that exist, one for each hierarchy."""
    return [root / name for root in hierarchies() if (root / name).exists()]


def _removed(folder: Path) -> bool:
    try:
        for inner in _bottom_up(folder):
            inner.rmdir()
    except FileNotFoundError:
        return not folder.exists()
    except OSError as error:
        # The kernel reports EBUSY for a short time after the last process of a cgroup has ended.
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def _bottom_up(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if inner.is_dir():
            yield from _bottom_up(inner)
    yield folder
