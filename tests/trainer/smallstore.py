"""A MinIO server whose disk is full in a moment: it lies on a file system of 40 MB of its own, and ballast fills it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.client import Store
from tests.trainer.objectstore import BUCKET, ObjectStore, running_store

FULL = re.compile("XMinioStorageFull|no space left on device|its disk may be full")
"""The last where a write runs out of room in its middle."""
PURGE_SECONDS = 5
"""What MinIO deletes lies in its trash first, which it empties every 5 minutes unless told otherwise."""
BALLAST = "ballast/"
BALLAST_BYTES = 4_000_000


@contextmanager
def small_store(minio: Path, folder: Path) -> Iterator[ObjectStore]:
    """Run a server on a file system of its own; skip the test where none can be mounted."""
    (folder / "data").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder / "data")]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode != 0:
        # A disk that really is full needs a small file system, which only root mounts.
        pytest.skip(f"a file system of its own needs root: {mounted.stderr.decode().strip()}")
    try:
        with running_store(minio, folder, variables={"MINIO_DELETE_CLEANUP_INTERVAL": f"{PURGE_SECONDS}s"}) as small:
            yield small
    finally:
        subprocess.run(["umount", "-l", str(folder / "data")], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def fill(small: ObjectStore, folder: Path) -> int:
    """Write objects until the store has no room, and return how many there was room for."""
    ballast = folder / "ballast"
    ballast.write_bytes(b"\1" * BALLAST_BYTES)
    store = Store(small.endpoint, "us-east-1", small.credentials, budget_seconds=0)
    for number in range(40):
        try:
            store.upload(BUCKET, f"{BALLAST}{number}", ballast)
        except OutsideFailure as failure:
            if FULL.search(str(failure)) is None:
                raise
            return number
    raise AssertionError("the store never filled up")


def make_room(small: ObjectStore) -> int:
    """Delete the ballast, as somebody does who needs it no longer; return how many objects there were."""
    names = small.keys(BALLAST)
    for name in names:
        small.client.remove_object(BUCKET, name)
    return len(names)
