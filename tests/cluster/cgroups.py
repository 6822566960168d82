"""A cgroup folder of its own for each cluster, in every hierarchy of the machine, version 1 or 2.

The kubelet puts all pods below it (``cgroupRoot``), so clusters do not mix, and one folder is all there is to remove.
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
    """Return where the cgroup file systems are mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] in {"cgroup", "cgroup2"}]


def create(name: str) -> None:
    """Create the folder ``name`` in every hierarchy, with every processor and controller usable below it.

    ``name`` may be a path whose parent was created the same way.
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
        # A new cpuset of version 1 starts empty, and nothing can run in an empty one.
        for setting in ("cpuset.cpus", "cpuset.mems"):
            file = folder / setting
            if file.exists() and not controllers.exists():
                file.write_text((root / setting).read_text())


def remove(name: str) -> None:
    """Remove the folder ``name`` and all below it from every hierarchy; its processes have ended before."""
    for root in hierarchies():
        folder = root / name
        wait_for(f"the cgroup {folder} to be empty", partial(_removed, folder), REMOVAL_TIMEOUT_SECONDS)


def processes(name: str) -> set[int]:
    """Return the ids of all processes in the folder ``name`` and below it, as the machine counts."""
    found: set[int] = set()
    for folder in existing(name):
        for inner in _bottom_up(folder):
            # A folder that has just been removed holds nothing.
            with contextlib.suppress(FileNotFoundError):
                found |= {int(line) for line in (inner / "cgroup.procs").read_text().split()}
    return found


def existing(name: str) -> list[Path]:
    """Return the folders ``name`` that exist."""
    return [root / name for root in hierarchies() if (root / name).exists()]


def _removed(folder: Path) -> bool:
    try:
        for inner in _bottom_up(folder):
            inner.rmdir()
    except FileNotFoundError:
        return not folder.exists()
    except OSError as error:
        # The kernel frees the cgroup of a process that has just ended a little later.
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def _bottom_up(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if inner.is_dir():
            yield from _bottom_up(inner)
    yield folder
