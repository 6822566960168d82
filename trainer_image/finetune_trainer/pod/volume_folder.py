"""A folder of files on a volume that the pods of many jobs share. `sources/cache/cache_folder.py` keeps the files of
models in one, and `data/prepared/example_cache.py` prepared examples in another one on the same volume.

Nothing in the folder is trusted, because every pod that mounts the volume can write to it: the caller copies the bytes
of a file and compares their digest. A file gets its name by one rename, so that no pod sees a part of it, and several
pods that write the same file do not harm each other. Where room is needed, the files that were not used for the longest
time go first, and none goes if even all of them would not make enough room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

FREE_SHARE, MOST_FREE_BYTES = 0.05, 10 << 30
"""Share of the volume that is left free for other files, and the largest number of bytes that is left free, where the
folder has no `Shares` of its own."""
LEFTOVER_SECONDS = 24 * 3600
"""An unfinished file counts as left by a pod that died if it was not changed for more than this many seconds. The next
pod that makes room for a file deletes it."""
MOST_FILES = 100_000
"""No file is added to a folder with more entries than this. Whoever can write to the volume could otherwise fill the
memory of each pod that looks for files to delete."""
UNFINISHED = "unfinished-"
"""The names of unfinished files begin with this text."""
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags to open a file that somebody else may have made: a symbolic link is not followed, and a named pipe does not
hold the pod up."""
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FILE_OF_OURS = (errno.ELOOP, errno.ENXIO, errno.EACCES)
"""Errors of opening a symbolic link, a socket, and a file that may not be read."""


class _Entry(NamedTuple):
    name: str
    found: os.stat_result


class Shares(NamedTuple):
    """How much of a volume a folder may take. Two folders of a volume do not delete each other's files, so one of them
    needs a limit, and may take some of the room that the other one leaves free."""

    largest: float = 1.0
    """Largest share of the volume that the folder's files take."""
    of_the_free: float = 0.0
    """Share of the room that is otherwise left free (FREE_SHARE, MOST_FREE_BYTES) which this folder may take too."""


_ALL = Shares()


class VolumeFolder:
    """An open folder on a mounted volume. All methods but `discard` and `note_use` raise OSError for errors of the
    volume's file system."""

    def __init__(
        self,
        mount: Path,
        folder: str,
        is_file: Callable[[str], bool],
        is_other_leftover: Callable[[str], bool] = lambda _: False,
        shares: Shares = _ALL,
    ) -> None:
        """Open the folder called ``folder`` below ``mount``, and create it if it does not exist. ``is_file`` returns
        whether a name is one of the caller's files, which may be deleted to make room. ``is_other_leftover`` returns
        whether a name is one of further files that count as left by a pod that died once they are old. ``shares`` is
        how much of the volume the folder may take."""
        self._is_file, self._is_other_leftover = is_file, is_other_leftover
        self._shares = shares
        self._lock = threading.Lock()
        path = mount / folder
        if not path.is_dir():
            path.mkdir(exist_ok=True)
        # All names are relative to the opened folder. So a link that somebody puts in the folder's place has no effect.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        """The open folder."""

    def __enter__(self) -> VolumeFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder. No other method may be called afterwards."""
        os.close(self.descriptor)

    @property
    def largest_bytes(self) -> int:
        """How many bytes the folder may hold if nothing else lies on the volume."""
        total, _ = self._space()
        return min(total - self._left_free(total), int(self._shares.largest * total))

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO | None]:
        """Yield the open file called ``name``, or None if there is none. Whatever is no plain file, or may not be read,
        is deleted and counts as absent."""
        try:
            descriptor = os.open(name, READ, dir_fd=self.descriptor)
        except FileNotFoundError:
            descriptor = -1
        except OSError as error:
            if error.errno not in _NO_FILE_OF_OURS:
                raise
            self.discard(name)
            descriptor = -1
        if descriptor >= 0 and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            self.discard(name)
            descriptor = -1
        if descriptor < 0:
            yield None
            return
        with os.fdopen(descriptor, "rb") as file:
            yield file

    @contextmanager
    def new_file(self, size: int, keep: Collection[str] = ()) -> Iterator[NewFile]:
        """Yield a new file, for which room for ``size`` bytes was made. The file is deleted at the end of the `with`
        block, unless it got a name. The files called ``keep`` are not deleted to make room. Raises OSError with ENOSPC
        where there is no room."""
        self._make_room(size, keep)
        unfinished = f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(unfinished, CREATE, 0o644, dir_fd=self.descriptor), "wb") as file:
                yield NewFile(file, unfinished, self.descriptor)
        finally:
            self.discard(unfinished)

    def note_use(self, name: str) -> None:
        """Note that the file called ``name`` was used now, if this pod may do so."""
        with contextlib.suppress(OSError):
            os.utime(name, dir_fd=self.descriptor, follow_symlinks=False)

    def discard(self, name: str) -> None:
        """Delete a file, if this pod may do so."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.descriptor)

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        """Delete what pods that died have left, and then the files that were not used for the longest time, until there
        is room for ``size`` bytes."""
        with self._lock:
            total, free = self._space()
            leftovers, files = self._entries()
            missing = size + self._left_free(total) - free
            if self._shares.largest < 1:
                taken = sum(_bytes(entry) for entry in leftovers + files)
                missing = max(missing, size + taken - int(self._shares.largest * total))
            spare = [entry for entry in files if entry.name not in keep]
            if missing > sum(_bytes(entry) for entry in leftovers + spare):
                # If even the deletion of all files would not make enough room, the files of others are kept.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for entry in leftovers:
                self.discard(entry.name)
                missing -= _bytes(entry)
            for entry in spare:
                if missing <= 0:
                    break
                self.discard(entry.name)
                missing -= _bytes(entry)

    def _space(self) -> tuple[int, int]:
        """Return the size of the volume and its free space in bytes."""
        volume = os.statvfs(self.descriptor)
        return volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize

    def _left_free(self, total: int) -> int:
        """Return how many of the ``total`` bytes of the volume this folder leaves free."""
        return int(min(FREE_SHARE * total, MOST_FREE_BYTES) * (1 - self._shares.of_the_free))

    def _entries(self) -> tuple[list[_Entry], list[_Entry]]:
        """Return two lists: what pods that died have left, and the caller's files in the order of their last use, the
        oldest first. Younger unfinished files, and files with other names, are in neither list."""
        entries = []
        with os.scandir(self.descriptor) as listed:
            for number, item in enumerate(listed):
                if number == MOST_FILES:
                    raise OSError(errno.ENOSPC, f"more than {MOST_FILES} files lie in the folder")
                with contextlib.suppress(FileNotFoundError):
                    if item.is_file(follow_symlinks=False):
                        entries.append(_Entry(item.name, item.stat(follow_symlinks=False)))
        # The clock of the file system may differ from that of this machine. So ages are measured back from the last
        # change of the newest file.
        old = max((entry.found.st_mtime for entry in entries), default=0.0) - LEFTOVER_SECONDS
        leftovers = [
            entry
            for entry in entries
            if entry.name.startswith(UNFINISHED) or self._is_other_leftover(entry.name)
            if entry.found.st_mtime < old
        ]
        files = [entry for entry in entries if self._is_file(entry.name)]
        return leftovers, sorted(files, key=lambda entry: entry.found.st_mtime)


class NewFile:
    """A file that is written and has no name that others look for yet."""

    def __init__(self, file: BinaryIO, unfinished: str, folder: int) -> None:
        """``file`` is the open file, which is called ``unfinished`` and lies in the open folder ``folder``."""
        self._file, self._unfinished, self._folder = file, unfinished, folder

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        self._file.write(data)

    def name(self, name: str) -> None:
        """Give the file its name, after all of it is on the volume. A file that has the name already is replaced."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.rename(self._unfinished, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)


def _bytes(entry: _Entry) -> int:
    """Return how many bytes of the volume a file takes."""
    return entry.found.st_blocks * 512
