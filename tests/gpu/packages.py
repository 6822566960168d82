"""Says which third-party packages the check can't import, and what to do about it. `__main__.py` asks this first.

A machine with GPUs often has a torch of its own and reaches no package registry.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "locks" / "trainer.txt"
FOLDER = "vendor"
HUB = (
    "huggingface-hub",
    "annotated-doc",
    "click",
    "filelock",
    "fsspec",
    "hf-xet",
    "httpx2",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "pyyaml",
    "rich",
    "shellingham",
    "typer",
)
"""What huggingface-hub needs. tokenizers and transformers need huggingface-hub."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "certifi": ("certifi",),
    "deepspeed": ("deepspeed", "einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "tqdm"),
    "minio": ("minio", "argon2-cffi", "argon2-cffi-bindings", "cffi", "pycparser", "pycryptodome"),
    "numpy": ("numpy",),
    "peft": ("peft", "accelerate"),
    "pydantic": ("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
    "requests": ("requests", "charset-normalizer", "idna"),
    "safetensors": ("safetensors",),
    "tokenizers": ("tokenizers", *HUB),
    "torch": ("torch",),
    "transformers": ("transformers", "regex"),
    "urllib3": ("urllib3",),
}
"""For each package that the check imports: the distribution that has the package, and the distributions that this one
needs and that no other line has. Dependencies of torch are left out, because a vendor folder must not bring a second
torch."""


def missing_packages(find: Callable[[str], object | None] = importlib.util.find_spec) -> list[str]:
    """Return the names of the packages that can't be imported here, in alphabetical order."""
    return [name for name in sorted(PACKAGES) if find(name) is None]


def advice(missing: list[str]) -> str:
    """Return a sentence about the packages ``missing``, and the command that makes a folder with them."""
    versions = _locked_versions()
    needed = [name for package in missing for name in PACKAGES[package]]
    pinned = " ".join(f"{name}=={versions[name]}" if name in versions else name for name in needed)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    torch = " torch must come with the machine, with CUDA libraries that fit its driver." if "torch" in missing else ""
    return (
        f"The packages {', '.join(missing)} can't be imported by {sys.executable}: on a machine with a package registry"
        f" and Python {python} run `DS_BUILD_OPS=0 pip install --no-deps --target {FOLDER} {pinned}`, copy the folder"
        f" {FOLDER} here, and add it to the end of PYTHONPATH.{torch}"
    )


def _locked_versions() -> Mapping[str, str]:
    """Return the versions of the trainer's lock by distribution. The mapping is empty where the lock is not here, as in
    a pod that mounts this folder alone."""
    if not LOCK.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
