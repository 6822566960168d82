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
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune_trainer.sources.content_digest import CHUNK_BYTES, NAME, ContentDigest
from finetune_trainer.storage.store_errors import writing

FOLDER = "finetune-models"
"""Name of the folder on the volume that holds all files of the cache."""
FREE_SHARE, MOST_FREE_BYTES = 0.05, 10 << 30
"""Share of the volume that the cache leaves free for other files, and the largest number of bytes that it leaves
free."""
LEFTOVER_SECONDS = 24 * 3600
"""An unfinished file or a turn counts as left by a pod that died if it was not changed for more than this many seconds.
The next pod that makes room for a file deletes it."""
_TURN_SUFFIX = ".turn"
_UNFINISHED = "unfinished-"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags to open a file that somebody else may have made: a symbolic link is not followed, and a named pipe does not
hold the pod up."""
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


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


class _Entry(NamedTuple):
    name: str
    found: os.stat_result


class ModelCache:
    """The folder of the cache on a mounted volume. The methods raise OSError for errors of the volume's file system,
    with three exceptions: `copy_out` treats a file that the pod may not read as absent. `copy_out` also goes on if it
    can't set the time of the file's last use. A file that can't be deleted stays, and only `check_writable` raises
    OSError for it."""

    def __init__(self, mount: Path, pace: Pace | None = None) -> None:
        """Open the folder below ``mount``, and create it if it does not exist."""
        self.pace = pace or Pace()
        self._lock = threading.Lock()
        path = mount / FOLDER
        if not path.is_dir():
            path.mkdir(exist_ok=True)
        # All names are relative to the opened folder. So a link that somebody puts in the folder's place has no effect.
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    @property
    def largest_bytes(self) -> int:
        """How many bytes the cache may hold if nothing else lies on the volume."""
        total, _ = self._space()
        return total - _left_free(total)

    def __enter__(self) -> ModelCache:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder. No other method may be called afterwards."""
        os.close(self._folder)

    def check_writable(self) -> None:
        """Create a file in the folder and delete it."""
        name = f"{_UNFINISHED}{secrets.token_hex(8)}"
        os.close(os.open(name, _CREATE, 0o644, dir_fd=self._folder))
        os.unlink(name, dir_fd=self._folder)

    def copy_out(self, digest: ContentDigest, target: Path) -> bool:
        """Copy the file called ``digest.name`` to ``target``. Return True if there is a file of this name and its
        content has the digest, else False.

        A file of this name is deleted if it has another content, is no plain file (for example a link), or may not be
        read. Raises OutsideFailure if ``target`` can't be written.
        """
        try:
            source = os.open(digest.name, _READ, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EACCES):
                raise
            # Somebody put a link, a socket or an unreadable file there.
            self._discard(digest.name)
            return False
        try:
            found = os.fstat(source)
            may_be_right = stat.S_ISREG(found.st_mode) and found.st_size == digest.bytes
            if may_be_right and _copied_digest(source, digest, target) == digest.value:
                # The time of the last change says when a file was last used.
                with contextlib.suppress(OSError):
                    os.utime(digest.name, dir_fd=self._folder, follow_symlinks=False)
                return True
        except OSError:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(source)
        target.unlink(missing_ok=True)
        self._discard(digest.name)
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
        self._make_room(digest.bytes, keep)
        name = f"{_UNFINISHED}{secrets.token_hex(8)}"
        target = os.open(name, _CREATE, 0o644, dir_fd=self._folder)
        try:
            with os.fdopen(target, "wb") as copy, path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    copy.write(chunk)
                copy.flush()
                os.fsync(target)
            if hasher.hexdigest() != digest.value:
                return False
            os.rename(name, digest.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            os.fsync(self._folder)
            return True
        finally:
            self._discard(name)

    def take_turn(self, name: str) -> Turn | None:
        """Return the turn to fetch ``name``, or None while another pod has the turn. ``name`` stands for the files that
        `cached_fetch.py` fetches with one call."""
        try:
            file = os.open(name + _TURN_SUFFIX, _CREATE, 0o644, dir_fd=self._folder)
        except FileExistsError:
            return None
        return Turn(file, name + _TURN_SUFFIX, self._folder, self.pace.beat_seconds)

    def sign_of_life(self, name: str) -> Sign | None:
        """Return the newest sign of life of the pod that has the turn for ``name``, or None if no pod has the turn."""
        try:
            # Network file systems ask for the state of a file anew when the file is opened.
            file = os.open(name + _TURN_SUFFIX, _READ, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
        return Sign(found.st_ino, found.st_mtime_ns)

    def end_turn_of_others(self, name: str) -> None:
        """Delete the turn for ``name`` of a pod that died or is too slow."""
        self._discard(name + _TURN_SUFFIX)

    def _has(self, digest: ContentDigest) -> bool:
        try:
            found = os.stat(digest.name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == digest.bytes

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        """Delete what pods that died have left, and then the files that were not used for the longest time, until there
        is room for ``size`` bytes. The files called ``keep`` stay. Raises OSError with ENOSPC if there can't be enough
        room."""
        with self._lock:
            total, free = self._space()
            missing = size + _left_free(total) - free
            leftovers, files = self._entries()
            spare = [(name, found) for name, found in files if name not in keep]
            if missing > sum(found.st_blocks * 512 for _, found in leftovers + spare):
                # If even the deletion of all files would not make enough room, the files of other models are kept.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, _ in leftovers:
                self._discard(name)
            missing -= sum(found.st_blocks * 512 for _, found in leftovers)
            for name, found in spare:
                if missing <= 0:
                    break
                self._discard(name)
                missing -= found.st_blocks * 512

    def _space(self) -> tuple[int, int]:
        """Return the size of the volume and its free space in bytes."""
        volume = os.statvfs(self._folder)
        return volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize

    def _entries(self) -> tuple[list[_Entry], list[_Entry]]:
        """Return two lists: what pods that died have left (see LEFTOVER_SECONDS), and the files of models in the order
        of their last use, the oldest first. Younger unfinished files and turns, and files with names that the cache
        does not use, are in neither list."""
        entries = []
        with os.scandir(self._folder) as listed:
            for item in listed:
                with contextlib.suppress(FileNotFoundError):
                    if item.is_file(follow_symlinks=False):
                        entries.append(_Entry(item.name, item.stat(follow_symlinks=False)))
        # The clock of the file system may differ from that of this machine. So ages are measured back from the last
        # change of the newest file.
        old = max((found.st_mtime for _, found in entries), default=0.0) - LEFTOVER_SECONDS
        leftovers = [
            entry
            for entry in entries
            if entry.name.startswith(_UNFINISHED) or entry.name.endswith(_TURN_SUFFIX)
            if entry.found.st_mtime < old
        ]
        files = [entry for entry in entries if NAME.fullmatch(entry.name)]
        return leftovers, sorted(files, key=lambda entry: entry.found.st_mtime)

    def _discard(self, name: str) -> None:
        """Delete a file, if this pod may do so."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder)


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


def _left_free(total: int) -> int:
    return min(int(FREE_SHARE * total), MOST_FREE_BYTES)


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
