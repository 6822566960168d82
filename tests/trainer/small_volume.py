"""A small file system of its own, so that a test can fill a disk within a second."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of ``size``, such as `64m`, at the existing folder ``folder``, and yield ``folder``. Skip the
    test if no file system can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    tried = subprocess.run(command, capture_output=True)
    if tried.returncode != 0:
        # A disk that really gets full needs a small file system of its own, and only root may mount one.
        pytest.skip(f"a file system of its own needs root: {tried.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
