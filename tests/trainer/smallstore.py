"""A MinIO server on a file system of 40 MB, so that a test can fill its disk within a second."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.client import Store
from tests.trainer.objectstore import BUCKET, ObjectStore, running_store
from tests.trainer.small_volume import mounted

FULL = re.compile("XMinioStorageFull|no space left on device|its disk may be full")
"""Matches the error messages of MinIO and of the trainer about a full disk. The last alternative is the trainer's
message where the store took only a part of an object."""
TRASH = Path("data/.minio.sys/tmp/.trash")
"""Folder to which MinIO moves deleted objects."""
BALLAST = "ballast/"
BALLAST_BYTES = 4_000_000


@contextmanager
def small_store(minio: Path, folder: Path) -> Iterator[ObjectStore]:
    """Run a MinIO server on a file system of 40 MB. Skip the test if no file system can be mounted."""
    (folder / "data").mkdir(parents=True)
    try:
        with (
            mounted(folder / "data", "40m"),
            running_store(minio, folder) as small,
        ):
            yield small
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill(small: ObjectStore, folder: Path) -> int:
    """Write objects of 4 MB until the disk is full, and return how many objects were written."""
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


def make_room(small: ObjectStore, folder: Path) -> int:
    """Delete the objects that `fill` wrote, as an administrator would, and return their number. ``folder`` is that of
    `small_store`.

    MinIO empties its trash every 5 minutes. `MINIO_DELETE_CLEANUP_INTERVAL` changes the first interval only where MinIO
    reads its configuration before it starts the timer, which it does not on a machine without other work. So this
    function empties the trash.
    """
    names = small.keys(BALLAST)
    for name in names:
        small.client.remove_object(BUCKET, name)
    for deleted in (folder / TRASH).iterdir():
        shutil.rmtree(deleted, ignore_errors=True)
    return len(names)
