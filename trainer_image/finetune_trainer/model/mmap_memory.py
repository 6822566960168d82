"""Frees the memory of memory-mapped weight files while a model is loaded from them.

`load.py` uses this module under ZeRO-3, where a rank maps every weight file until the last tensor is copied into a
shard. The kernel frees the pages of mapped files only when memory gets short. Until then the pages count as memory of
this process, so that the process would hold a whole model in addition to its shard.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DONTNEED = 4
"""`MADV_DONTNEED` of Linux's madvise(2), which frees pages. A later access reads the pages from the file again."""
INTERVAL_SECONDS = 0.05


@contextmanager
def release_mapped_pages(folder: Path) -> Iterator[None]:
    """While the block runs, free the memory of the weight files in ``folder`` that this process has mapped, once every
    INTERVAL_SECONDS.

    Use this only for files that are read and not written, because changes that were written through a mapping would be
    lost.
    """
    prefixes = {str(folder.resolve()), *(str(path.resolve()) for path in folder.glob("*.safetensors"))}
    done = threading.Event()

    def drop() -> None:
        while not done.wait(INTERVAL_SECONDS):
            release_pages(prefixes)

    dropper = threading.Thread(target=drop, name="mapped pages", daemon=True)
    dropper.start()
    try:
        yield
    finally:
        done.set()
        dropper.join()


def release_pages(prefixes: set[str]) -> int:
    """Free the pages of all mappings of files whose path begins with one of ``prefixes``. Return the size of the freed
    mappings in bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    dropped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not any(fields[5].startswith(prefix) for prefix in prefixes):
            continue
        start, end = (int(bound, 16) for bound in fields[0].split("-"))
        # madvise returns an error where the loader has removed the mapping in the meantime, and nothing is left to
        # free.
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED) == 0:
            dropped += end - start
    return dropped
