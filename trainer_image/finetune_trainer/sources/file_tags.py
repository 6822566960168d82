"""Computes tags of local files. If the content of a file changes, its tag changes too. `data_files.py` and
`model_files.py` use the tags for files on a volume.

The tag of a large file is made of its size, the time of its last change, and parts of its content.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_BYTES = 64 * 1024 * 1024
"""Largest size in bytes of a file whose tag has the sha256 of all its bytes."""
PIECES = 16
PIECE_BYTES = 256 * 1024
"""Of a file that is larger than WHOLE_BYTES, PIECES pieces of PIECE_BYTES bytes each are read, at even distances from
the first byte of the file to its last. The preflight check has no time to read hundreds of gigabytes of weights."""


def file_tag(path: Path) -> str:
    """Return a tag of the content of ``path``.

    For a file of more than `WHOLE_BYTES` bytes the tag also holds the time of the last change. Without it, a change
    between the pieces that are read would not be noticed.
    """
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= WHOLE_BYTES:
            return f"{status.st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
        hasher = hashlib.sha256()
        for piece in range(PIECES):
            file.seek(piece * (status.st_size - PIECE_BYTES) // (PIECES - 1))
            hasher.update(file.read(PIECE_BYTES))
    return f"{status.st_size} {status.st_mtime_ns} {hasher.hexdigest()}"
