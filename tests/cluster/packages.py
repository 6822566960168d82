"""Install the Debian packages that the cluster and the image builds need. A package is not installed if the machine
already has its program."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

# Maps each Debian package to one of its programs or files. If the machine already has this program, from whatever
# source, the package is not needed.
NODE_PACKAGES: Mapping[str, str] = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "ip",
    "mount": "mount",
    "util-linux": "nsenter",
    "busybox-static": "/bin/busybox",
}
IMAGE_PACKAGES: Mapping[str, str] = {"buildah": "buildah", "debootstrap": "debootstrap"}

APT_TIMEOUT_SECONDS = 900


def install(packages: Mapping[str, str]) -> None:
    """Install those of ``packages`` whose program is missing. Raise ClusterError if they can't be installed."""
    missing = [package for package, program in packages.items() if not _present(program)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(f"this machine lacks {', '.join(missing)} and has no apt-get to install them with")
    if os.geteuid() != 0:
        raise ClusterError(f"this machine lacks {', '.join(missing)}: run this once as root, or apt-get install them")
    with step(f"installing Debian packages: {', '.join(missing)}"):
        _apt(["update"])
        _apt(["install", "--yes", "--no-install-recommends", *missing])


def _present(program: str) -> bool:
    if program.startswith("/"):
        return os.access(program, os.X_OK)
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is not None


def _apt(arguments: Iterable[str]) -> None:
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=APT_TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
