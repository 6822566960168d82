"""The few Debian packages that the cluster and the image builds need; only what is missing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

# Package -> a file or program that shows it is there. A machine that has the program from elsewhere needs no package.
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
    """Install those of ``packages`` whose program is missing."""
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
