"""Install the Debian packages that the cluster and the image builds need. A package is not installed if the machine
already has its program. The package prometheus is only unpacked: the tests need just one program of it, and its
installation would start a service."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

# Maps each Debian package to one of its programs or files. If the machine already has this program or file, from any
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

UNPACKED_PACKAGES: Mapping[str, str] = {"prometheus": "usr/bin/promtool"}
"""Maps each Debian package of which only one program is used to the path of this program in the package. The packages
are unpacked and not installed, because their installation would also start a service."""

APT_TIMEOUT_SECONDS = 900


def install(packages: Mapping[str, str]) -> None:
    """Install the packages in ``packages`` whose program is missing. Raise ClusterError if a package can't be
    installed."""
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


def unpacked_program(package: str) -> Path | None:
    """Return the path of the program of ``package``, one of `UNPACKED_PACKAGES`. The environment variable
    FINETUNE_TOOL_<PROGRAM>, for example FINETUNE_TOOL_PROMTOOL, contains the path if it is set. If it is not set, the
    path is that of the program in the cache folder, or None if the program is not there because `unpack` was not
    called."""
    program = Path(UNPACKED_PACKAGES[package])
    if named := os.environ.get(f"FINETUNE_TOOL_{program.name.upper()}"):
        return Path(named)
    path = cache_folder() / f"deb-{package}" / program
    return path if path.is_file() else None


def unpack() -> None:
    """Put the programs of `UNPACKED_PACKAGES` into the cache folder. Raise ClusterError if that fails."""
    for package in UNPACKED_PACKAGES:
        with locked(f"deb-{package}"):
            if unpacked_program(package) is None:
                _download_and_unpack(package)


def _download_and_unpack(package: str) -> None:
    folder = cache_folder() / f"deb-{package}"
    with step(f"unpacking the Debian package {package}"), tempfile.TemporaryDirectory(dir=cache_folder()) as downloads:
        # If root runs apt, the download runs as the user `_apt`, which must be able to write into the folder.
        Path(downloads).chmod(0o777)
        if os.geteuid() == 0:
            _apt(["update"])
        _apt(["download", package], folder=Path(downloads))
        (archive,) = Path(downloads).glob("*.deb")
        _run(["dpkg-deb", "--extract", str(archive), f"{downloads}/content"])
        shutil.rmtree(folder, ignore_errors=True)
        Path(downloads, "content").rename(folder)


def _present(program: str) -> bool:
    if program.startswith("/"):
        return os.access(program, os.X_OK)
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is not None


def _apt(arguments: Iterable[str], folder: Path | None = None) -> None:
    _run(["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments], folder)


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=APT_TIMEOUT_SECONDS, cwd=folder
    )
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
