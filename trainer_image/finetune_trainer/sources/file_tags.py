"""Tags of local files: texts that differ where the contents of two files differ. Of large files only parts are read.
`identities.py` and `model_files.py` use the tags for files on a volume."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_BYTES = 64 * 1024 * 1024
"""Largest file in bytes whose tag is the sha256 of all its bytes."""
PIECES = 16
PIECE_BYTES = 256 * 1024
"""PIECES pieces of PIECE_BYTES bytes are read of a larger file, such as weights, at even distances from its first byte
to its last. The preflight check has no time to read hundreds of gigabytes."""


def file_tag(path: Path) -> str:
    """Return a tag of the content of ``path``.

    For a file of more than `WHOLE_BYTES` bytes the tag also holds the time of the last change, because a change
    between the pieces that are read would not be noticed otherwise.
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
