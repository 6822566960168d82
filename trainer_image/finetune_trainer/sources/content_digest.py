"""Digests of the content of model files. The Hugging Face Hub states the sha256 or the Git id of a file, an object
store states the ETag, and the manifest of another job's artifact states the sha256. If the source states no digest, or
an ETag that is no digest, the pod that fetches the file computes the sha256 itself. A copy of a file on a volume to
which other jobs write too is used only if the copy has the file's digest.

`model_files.py`, `adapter_files.py` and `cache/cached_fetch.py` make the digests, and `cache/cache_folder.py` compares
them with the bytes of files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from finetune_trainer.storage.client import EtagForm

CHUNK_BYTES = 4 << 20
"""How many bytes of a file are read and hashed at once."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"([0-9a-f]{32})(?:-([1-9][0-9]{0,4}))?")
NAME = re.compile(r"(sha256|git|etag)-[-0-9a-f]{32,90}")
"""Regular expression for the names that `ContentDigest.name` returns."""


class Hasher(Protocol):
    """Takes the bytes of a file in their order, and then returns their digest."""

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentDigest:
    """Size and digest of the content that a file must have."""

    algorithm: Literal["sha256", "git", "etag"]
    value: str
    """The digest as the source writes it, in hexadecimal. The ETag of an object that was uploaded in parts ends with
    `-` and the number of its parts."""
    bytes: int
    part_bytes: int = 0
    """Size in bytes of each part of an object that was uploaded in parts, except its last part. 0 for other files."""

    @property
    def name(self) -> str:
        """A name for a file with this content. Two contents have the same name only if their digests are equal."""
        return "-".join(str(part) for part in (self.algorithm, self.value, self.bytes, self.part_bytes or "") if part)

    @property
    def is_certain(self) -> bool:
        """Whether a file that does not have this digest is certainly wrong. False for an ETag, because the ETags of
        some object stores are no digests of the content."""
        return self.algorithm != "etag"

    def is_of(self, path: Path) -> bool:
        """Return whether a local file has this content."""
        hasher = self.hasher()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest() == self.value

    def hasher(self) -> Hasher:
        """Return an object that computes this kind of digest."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        if self.algorithm == "git":
            # Git's id of a file is the sha1 of a header and the content.
            return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
        return _EtagHasher(self.part_bytes)


def hub_digest(*, size: int, sha256: str | None, blob_id: str) -> ContentDigest | None:
    """Return the digest of a file on the Hugging Face Hub, or None if the hub's answer has no valid digest. ``blob_id``
    is the Git id of the file. ``sha256`` is None unless the file is in Git LFS. For a file in Git LFS, ``blob_id`` is
    the id of a pointer file, so the bytes of the file itself can't be compared with ``blob_id``."""
    if sha256 is not None:
        is_valid = _SHA256.fullmatch(sha256) is not None
        return ContentDigest(algorithm="sha256", value=sha256, bytes=size) if is_valid else None
    is_valid = _SHA1.fullmatch(blob_id) is not None
    return ContentDigest(algorithm="git", value=blob_id, bytes=size) if is_valid else None


def own_digest(size: int, sha256: str) -> ContentDigest:
    """Return the digest of a file whose ``sha256`` comes from a pod of this job, or from the manifest of another job's
    artifact."""
    return ContentDigest(algorithm="sha256", value=sha256, bytes=size)


def object_digest(*, size: int, etag: str, form: Callable[[bool], EtagForm | None]) -> ContentDigest | None:
    """Return the digest that the ETag of an object states, or None if this ETag can't be a digest of the content.
    ``form`` is a function: it is called with True if the object was uploaded in parts, else with False. It returns how
    the ETag was computed, or None if the ETag can't be a digest."""
    match = _ETAG.fullmatch(etag)
    found = form(match[2] is not None) if match is not None else None
    if match is None or found is None or (match[2] and found.part_bytes <= 0):
        return None
    return ContentDigest(algorithm="etag", value=etag, bytes=size, part_bytes=found.part_bytes)


class _EtagHasher:
    """Computes the ETag of an object. The ETag of an object that was uploaded as a whole is the MD5 of the content. The
    ETag of an object that was uploaded in parts is the MD5 of the MD5s of all parts, followed by `-` and the number of
    parts."""

    def __init__(self, part_bytes: int) -> None:
        """``part_bytes`` is the size of a part, or 0 for an object that was uploaded as a whole."""
        self._part_bytes = part_bytes
        self._part = hashlib.md5(usedforsecurity=False)
        self._filled = 0
        self._parts: list[bytes] = []

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while self._part_bytes and self._filled + len(view) >= self._part_bytes:
            missing = self._part_bytes - self._filled
            self._part.update(view[:missing])
            view = view[missing:]
            self._close_part()
        self._part.update(view)
        self._filled += len(view)

    def hexdigest(self) -> str:
        """Return the ETag of all bytes so far."""
        if not self._part_bytes:
            return self._part.hexdigest()
        parts = [*self._parts, *([self._part.digest()] if self._filled else [])]
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def _close_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part = hashlib.md5(usedforsecurity=False)
        self._filled = 0
