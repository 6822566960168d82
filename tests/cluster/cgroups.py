"""Create and remove the cgroup folder of a cluster in every cgroup hierarchy (version 1 or 2) of the machine.

The kubelet creates the cgroups of all its pods below this folder (``cgroupRoot``). Two clusters therefore share no
cgroups, and at the end of a cluster only this folder has to be removed from each hierarchy.
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
    """Return the folders at which cgroup file systems are mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] in {"cgroup", "cgroup2"}]


def create(name: str) -> None:
    """Create the cgroup folder ``name`` in every hierarchy. Processes in this cgroup may use all CPUs and controllers
    of the parent folder.

    ``name`` may be a path like ``"cluster/node-2"``, if an earlier call has created the parent folder.
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
        # In version 1 a new cpuset has no CPUs and no memory nodes, and no process can join it. The settings of the
        # parent folder are therefore copied.
        for setting in ("cpuset.cpus", "cpuset.mems"):
            file = folder / setting
            if file.exists() and not controllers.exists():
                file.write_text((root / setting).read_text())


def remove(name: str) -> None:
    """Remove the cgroup folder ``name`` and all folders below it from every hierarchy. All of their processes must have
    ended before."""
    for root in hierarchies():
        folder = root / name
        wait_for(f"the cgroup {folder} to be empty", partial(_removed, folder), REMOVAL_TIMEOUT_SECONDS)


def processes(name: str) -> set[int]:
    """Return the process ids of all processes in the cgroup folder ``name`` and below it, as the machine's PID
    namespace numbers them."""
    found: set[int] = set()
    for folder in existing(name):
        for inner in _bottom_up(folder):
            # A folder that is removed during the loop is skipped, because it has no processes any more.
            with contextlib.suppress(FileNotFoundError):
                found |= {int(line) for line in (inner / "cgroup.procs").read_text().split()}
    return found


def existing(name: str) -> list[Path]:
    """Return the paths at which the cgroup folder ``name`` exists: at most one in each hierarchy."""
    return [root / name for root in hierarchies() if (root / name).exists()]


def _removed(folder: Path) -> bool:
    try:
        for inner in _bottom_up(folder):
            inner.rmdir()
    except FileNotFoundError:
        return not folder.exists()
    except OSError as error:
        # The kernel reports EBUSY for a short time after the last process of a cgroup has ended, so the caller tries
        # again.
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def _bottom_up(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if inner.is_dir():
            yield from _bottom_up(inner)
    yield folder
