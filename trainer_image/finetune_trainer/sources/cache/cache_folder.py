"""Keeps the files of models on a volume that the pods of many jobs share (`storage.cache.claimName`).

Nothing on the volume is trusted, because every pod that mounts the claim can write to it. A file is copied into the
pod's own scratch space, and counts only if the copied bytes have the right digest: the one that the model's source
states, or one that a pod of this job has computed. So a file that somebody else changes or deletes at any time, also
during the training, harms no pod. A file appears under its name in one step, by a rename on the same file system. A
`Turn` keeps several pods from fetching the same file at once. A turn is no lock: a pod that died loses it, and two pods
that fetch the same file do not harm each other.

`cached_fetch.py` calls this module.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune_trainer.pod.volume_folder import CREATE, READ, UNFINISHED, VolumeFolder
from finetune_trainer.sources.content_digest import CHUNK_BYTES, NAME, ContentDigest
from finetune_trainer.storage.store_errors import writing

FOLDER = "finetune-models"
"""Name of the folder on the volume that holds all files of the cache."""
_TURN_SUFFIX = ".turn"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often a pod that fetches a file shows that it is alive, how often waiting pods look, and how long they
    wait."""

    beat_seconds: float = 5.0
    """Time between two signs of life of the pod that fetches."""
    dead_seconds: float = 60.0
    """Time without a sign of life after which another pod takes the turn. Network file systems may show the old time of
    a file's last change for up to 60 s, unless the file is opened."""
    look_seconds: float = 1.0
    """Time that a waiting pod lets pass before it looks again."""
    least_bytes_per_second: int = 4 << 20
    """Slowest download that other pods wait for. They wait for `dead_seconds` and the time that a download at this
    speed takes, and no longer."""


class Sign(NamedTuple):
    """State of the file with which another pod shows that it has a turn. If two states at different times are equal,
    the pod gave no sign of life in between."""

    inode: int
    changed_ns: int


class ModelCache:
    """The folder of the cache on a mounted volume. The methods raise OSError for errors of the volume's file system,
    with three exceptions: `copy_out` treats a file that the pod may not read as absent. `copy_out` also goes on if it
    can't set the time of the file's last use. A file that can't be deleted stays, and only `check_writable` raises
    OSError for it."""

    def __init__(self, mount: Path, pace: Pace | None = None) -> None:
        """Open the folder below ``mount``, and create it if it does not exist."""
        self.pace = pace or Pace()
        self._files = VolumeFolder(mount, FOLDER, _is_file, _is_turn)
        self._folder = self._files.descriptor

    @property
    def largest_bytes(self) -> int:
        """How many bytes the cache may hold if nothing else lies on the volume."""
        return self._files.largest_bytes

    def __enter__(self) -> ModelCache:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder. No other method may be called afterwards."""
        self._files.__exit__()

    def check_writable(self) -> None:
        """Create a file in the folder and delete it."""
        name = f"{UNFINISHED}{secrets.token_hex(8)}"
        os.close(os.open(name, CREATE, 0o644, dir_fd=self._folder))
        os.unlink(name, dir_fd=self._folder)

    def copy_out(self, digest: ContentDigest, target: Path) -> bool:
        """Copy the file called ``digest.name`` to ``target``. Return True if there is a file of this name and its
        content has the digest, else False.

        A file of this name is deleted if it has another content, is no plain file (for example a link), or may not be
        read. Raises OutsideFailure if ``target`` can't be written.
        """
        with self._files.opened(digest.name) as source:
            if source is None:
                return False
            try:
                may_be_right = os.fstat(source.fileno()).st_size == digest.bytes
                if may_be_right and _copied_digest(source.fileno(), digest, target) == digest.value:
                    self._files.note_use(digest.name)
                    return True
            except OSError:
                target.unlink(missing_ok=True)
                raise
        target.unlink(missing_ok=True)
        self._files.discard(digest.name)
        return False

    def copy_in(self, digest: ContentDigest, path: Path, keep: Collection[str]) -> bool:
        """Copy the local file ``path`` into the cache, and return whether the file has the digest ``digest``. A file
        with another digest is not kept. Nothing is written if the cache already has a file with the digest's name and
        size.

        ``keep`` are the names of files that are not deleted to make room. Raises OSError with ENOSPC where there is no
        room.
        """
        if self._has(digest):
            return digest.is_of(path)
        hasher = digest.hasher()
        with self._files.new_file(digest.bytes, keep) as new:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    new.write(chunk)
            if hasher.hexdigest() != digest.value:
                return False
            new.name(digest.name)
        return True

    def take_turn(self, name: str) -> Turn | None:
        """Return the turn to fetch ``name``, or None while another pod has the turn. ``name`` stands for the files that
        `cached_fetch.py` fetches with one call."""
        try:
            file = os.open(name + _TURN_SUFFIX, CREATE, 0o644, dir_fd=self._folder)
        except FileExistsError:
            return None
        return Turn(file, name + _TURN_SUFFIX, self._folder, self.pace.beat_seconds)

    def sign_of_life(self, name: str) -> Sign | None:
        """Return the newest sign of life of the pod that has the turn for ``name``, or None if no pod has the turn."""
        try:
            # Network file systems ask for the state of a file anew when the file is opened.
            file = os.open(name + _TURN_SUFFIX, READ, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
        return Sign(found.st_ino, found.st_mtime_ns)

    def end_turn_of_others(self, name: str) -> None:
        """Delete the turn for ``name`` of a pod that died or is too slow."""
        self._files.discard(name + _TURN_SUFFIX)

    def _has(self, digest: ContentDigest) -> bool:
        try:
            found = os.stat(digest.name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == digest.bytes


def _is_file(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def _is_turn(name: str) -> bool:
    return name.endswith(_TURN_SUFFIX)


class Turn:
    """The turn to fetch files. A `with` block around the turn shows other pods that this process is alive, and gives
    the turn back at its end."""

    def __init__(self, file: int, name: str, folder: int, beat_seconds: float) -> None:
        """``file`` is the turn's own file, which is open. It is called ``name`` and lies in the open folder
        ``folder``."""
        self._file, self._name, self._folder, self._beat_seconds = file, name, folder, beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="model-cache-turn", daemon=True)

    def __enter__(self) -> Turn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            # Another pod may have taken the turn, with a new file, because this process seemed to be dead or too slow.
            if found.st_ino == os.fstat(self._file).st_ino:
                os.unlink(self._name, dir_fd=self._folder)
        os.close(self._file)

    def _beat(self) -> None:
        """Set the time of the last change of the turn's file to now, again and again, until the turn ends. Other pods
        see the change as a sign of life."""
        while not self._ended.wait(self._beat_seconds):
            with contextlib.suppress(OSError):
                os.utime(self._file)


class Patience:
    """Decides how long a pod waits for the turns of other pods."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._waits: dict[str, tuple[Sign | None, float, float]] = {}

    def is_over(self, name: str, sign: Sign | None, size: int) -> bool:
        """Return whether this pod should stop waiting for the pod that has the turn for ``name``, because that pod gave
        no sign of life for some time, or takes too long for ``size`` bytes. ``sign`` is the newest sign of life."""
        now = time.monotonic()
        last, last_change, began = self._waits.get(name, (sign, now, now))
        if sign != last:
            last_change = now
        self._waits[name] = (sign, last_change, began)
        limit = self._pace.dead_seconds + size / self._pace.least_bytes_per_second
        return now - last_change > self._pace.dead_seconds or now - began > limit


def _copied_digest(source: int, digest: ContentDigest, target: Path) -> str:
    """Copy the open file ``source`` to ``target``, and return the digest of what was copied. Raises OutsideFailure if
    ``target`` can't be written.

    No more bytes are copied than the file must have, because another writer may let the file grow without end.
    """
    hasher, left = digest.hasher(), digest.bytes
    with writing(target):
        copy = target.open("wb")
    try:
        while left and (chunk := os.read(source, min(CHUNK_BYTES, left))):
            hasher.update(chunk)
            left -= len(chunk)
            with writing(target):
                copy.write(chunk)
    finally:
        with writing(target):
            # Closing writes what is left in the buffer, and fails again where an earlier write has failed.
            copy.close()
    return hasher.hexdigest()
