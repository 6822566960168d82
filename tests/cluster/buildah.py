"""Run buildah as root. Its image storage is in the cache folder.

Each call runs in mount and PID namespaces of its own, so that no mount and no process of buildah stays on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.cache import cache_folder
from tests.cluster.registry import serving
from tests.cluster.waiting import ClusterError, tail
from tests.cluster.wheels import pip

BUILD_TIMEOUT_SECONDS = 3600
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--")

# Files of the machine that are mounted into every RUN step of a Dockerfile. With these certificates and this
# configuration of pip, a RUN step can use the same package index as the machine.
MACHINE_FILES = (Path("/etc/ssl/certs"), Path("/etc/pip.conf"))


def build(name: str, dockerfile: Path, context: Path, base: str | None = None) -> str:
    """Build a Dockerfile and return the name of the built image in buildah's storage.

    ``base`` becomes the Dockerfile's build argument BASE. In a RUN step with ``--mount=type=cache,id=uv`` or
    ``id=pip``, the mounted cache is the download cache of the machine's uv or pip, so that packages are not downloaded
    a second time.
    """
    _share_download_caches()
    volumes = [f"--volume={path}:{path}:ro" for path in MACHINE_FILES if path.exists()]
    arguments = [f"--build-arg=BASE={base}"] if base else []
    target = f"localhost/{name}:latest"
    _run(
        name,
        ["bud", "--layers", "--isolation=chroot", *volumes, *arguments],
        [f"--file={dockerfile}", f"--tag={target}", str(context)],
    )
    return target


def push(built: str, name: str, tag: str) -> None:
    """Push the image ``built`` from buildah's storage into the storage of the clusters' registry, as ``name:tag``.

    The layers are compressed by zstd at level 1, so that pushing and pulling take less CPU time than with gzip.
    """
    with serving() as registry:
        compression = ["--format=oci", "--compression-format=zstd", "--compression-level=1"]
        options = ["push", "--quiet", "--tls-verify=false", *compression]
        _run(name, options, [built, f"docker://{registry.address}/{name}:{tag}"], enter=registry.command)


def exists(image: str) -> bool:
    """Return whether buildah's storage holds an image of this name."""
    found = subprocess.run(
        _command(["inspect", "--type=image", image]), capture_output=True, env=_environment(), timeout=60
    )
    return found.returncode == 0


def images_folder() -> Path:
    """Return the folder for buildah's storage, logs and temporary files, and create it if needed. The registry's
    storage is another folder."""
    folder = cache_folder() / "images"
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return folder


def _run(
    name: str,
    options: Sequence[str],
    operands: Sequence[str],
    enter: Callable[[Sequence[str]], list[str]] = list,
) -> None:
    log = images_folder() / f"{name}.log"
    with log.open("ab") as output:
        done = subprocess.run(
            enter(_command([*options, *operands])),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            timeout=BUILD_TIMEOUT_SECONDS,
        )
    if done.returncode != 0:
        raise ClusterError(f"buildah {options[0]} of {name} failed\n{tail(log, 40)}")


def _command(arguments: Sequence[str]) -> list[str]:
    folder = images_folder()
    storage = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}", "--storage-driver=overlay"]
    return [*ISOLATED, "buildah", *storage, *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(images_folder() / "tmp")}


def _share_download_caches() -> None:
    """Make buildah use the download caches of the machine's pip and uv. buildah looks for the cache mounts ``pip`` and
    ``uv`` in two folders. This function creates these folders as links to the download caches."""
    mounts = images_folder() / "tmp" / "buildah-cache"
    mounts.mkdir(exist_ok=True)
    caches = {"pip": [*pip(), "cache", "dir"]}
    uv = shutil.which("uv", path=f"{os.environ.get('PATH', os.defpath)}:{cache_folder() / 'uv' / 'bin'}")
    if uv:
        caches["uv"] = [uv, "cache", "dir"]
    for name, command in caches.items():
        link = mounts / name
        if link.is_symlink() or link.exists():
            continue
        found = subprocess.run(command, text=True, capture_output=True, timeout=60)
        if found.returncode == 0:
            folder = Path(found.stdout.strip())
            folder.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
