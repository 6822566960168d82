"""The cache folder. It contains programs, images and packages that are built or downloaded once and then used by all
later clusters."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Return the path of the cache folder, and create the folder if needed. The path is ``$FINETUNE_CACHE`` if that is
    set, and otherwise ``finetune-operator`` in the user's cache folder."""
    named = os.environ.get("FINETUNE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else home / "finetune-operator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock ``name`` of the cache folder during the block, so that two processes never build the same thing at
    the same time. While another process holds the lock, wait."""
    folder = cache_folder() / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another process holds the lock {name!r} of the cache folder, waiting for it",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
