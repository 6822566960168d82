"""Lets go of pages of mapped weight files while a model is read from them.

Under ZeRO-3 one rank of the gang maps every weight file until the last tensor is copied. The kernel would take the
pages back when memory gets short, but until then they count as this process's memory, a whole model beside its shard.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DONTNEED = 4
"""`MADV_DONTNEED` of Linux: drop the pages; a later access reads the file again."""
INTERVAL_SECONDS = 0.05


@contextmanager
def letting_go(folder: Path) -> Iterator[None]:
    """While the block runs, drop pages of this process's mappings of files in ``folder`` again and again.

    Only for files that are read and never written through the mapping: changes would be dropped too.
    """
    prefixes = {str(folder.resolve()), *(str(path.resolve()) for path in folder.glob("*.safetensors"))}
    done = threading.Event()

    def drop() -> None:
        while not done.wait(INTERVAL_SECONDS):
            drop_pages(prefixes)

    dropper = threading.Thread(target=drop, name="mapped pages", daemon=True)
    dropper.start()
    try:
        yield
    finally:
        done.set()
        dropper.join()


def drop_pages(prefixes: set[str]) -> int:
    """Drop the pages of all mappings of files whose path begins with one of ``prefixes``; return their bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    dropped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not any(fields[5].startswith(prefix) for prefix in prefixes):
            continue
        start, end = (int(bound, 16) for bound in fields[0].split("-"))
        # The mapping may be gone by now: then there is nothing to drop, and the call says so.
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED) == 0:
            dropped += end - start
    return dropped
