"""Opens folders and files of a folder store, and puts files into it, in such a way that nothing outside of the store is
reached and no file is ever there in part. `folder_store.py` calls the functions.

Each folder on the way to an object is opened relative to the folder above it, and symbolic links are never followed. So
a link does no harm either where somebody puts it into the store between a check and the use of a path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.folder.folder_errors import foreign_entry, missing_folder

T = TypeVar("T")

PARTIAL = ".partial-"
"""Names of files that are being written begin with this text. Such a file is no object."""
FOLDER_MODE, FILE_MODE = 0o700, 0o600
"""Permissions of new folders and files. Only the user may read them, because checkpoints and answers can contain rows
of the data."""
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
TRIES = 100
"""How many times `put_file` tries to put a file into its folder, where each time somebody else deletes the empty folder
or the unfinished file."""
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""With O_NONBLOCK, opening a named pipe does not wait for a writer."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def checked_parts(base: Path, parts: Sequence[str]) -> list[str]:
    """Return ``parts``, the names of the folders and of the file on the way from ``base`` to an object. Raises
    OutsideFailure where one of them can't be such a name or would lead out of the store."""
    for part in parts:
        try:
            is_name = os.fsencode(part) not in (b"", b".", b"..") and not set(part) & {"/", "\0"}
        except UnicodeEncodeError:
            is_name = False
        if not is_name or part.startswith(PARTIAL):
            path = "/".join(parts)
            raise OutsideFailure(f"storage.folder: {path!r} can't name an object in {base}, because of {part!r}")
    return list(parts)


@contextlib.contextmanager
def opened_folder(base: Path, parts: Sequence[str], *, create: bool = False) -> Iterator[int | None]:
    """Open the folder that ``parts`` lead to from ``base``, and yield its file descriptor. If it does not exist, create
    it and the folders above it where ``create`` is true, else yield None.

    Raises RequestFailedError if ``base`` does not exist, and Damaged if a part is neither a folder nor a file. With
    ``create``, raises NotADirectoryError if a part is a file.
    """
    try:
        folder: int | None = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise missing_folder(base) from None
    path = base
    try:
        for part in parts:
            if folder is None:
                break
            path = path / part
            above, folder = folder, None
            try:
                folder = _open_below(above, part, path, create=create)
            finally:
                os.close(above)
        yield folder
    finally:
        if folder is not None:
            os.close(folder)


def _open_below(above: int, part: str, path: Path, *, create: bool) -> int | None:
    try:
        return os.open(part, _OPEN_FOLDER, dir_fd=above)
    except FileNotFoundError:
        if not create:
            return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        refuse_foreign(path, os.stat(part, dir_fd=above, follow_symlinks=False).st_mode)
        if create:
            raise
        return None
    with contextlib.suppress(FileExistsError):
        os.mkdir(part, FOLDER_MODE, dir_fd=above)
    sync_folder(above)
    return os.open(part, _OPEN_FOLDER, dir_fd=above)


def refuse_foreign(path: Path, mode: int) -> None:
    """Raise Damaged if ``mode``, the mode of the entry at ``path``, is that of neither a folder nor a file."""
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise foreign_entry(path, KINDS.get(stat.S_IFMT(mode), "a special file"))


@contextlib.contextmanager
def opened_file(base: Path, parts: Sequence[str]) -> Iterator[int | None]:
    """Open the file that ``parts`` lead to from ``base``, and yield its file descriptor, or None if there is no such
    file. Raises RequestFailedError if ``base`` does not exist, and Damaged if a part is neither a folder nor a file."""
    with opened_folder(base, parts[:-1]) as folder:
        file = _open_in(folder, parts[-1], base.joinpath(*parts)) if folder is not None else None
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def _open_in(folder: int, name: str, path: Path) -> int | None:
    try:
        file = os.open(name, _OPEN_FILE, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        # A symbolic link can't be opened in this way (ELOOP), and neither can a socket (ENXIO).
        if error.errno in (errno.ELOOP, errno.ENXIO):
            refuse_foreign(path, os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        raise
    try:
        mode = os.fstat(file).st_mode
        refuse_foreign(path, mode)
    except BaseException:
        os.close(file)
        raise
    if stat.S_ISDIR(mode):
        os.close(file)
        return None
    return file


class Placing(NamedTuple):
    """A file whose content is on the disk, and the place that it gets. Both are names in the same folder."""

    partial: str
    name: str
    folder: int
    """File descriptor of the folder."""


def put_file(
    base: Path, parts: Sequence[str], fill: Callable[[int], T], place: Callable[[Placing], bool]
) -> tuple[T, bool]:
    """Write a file beside the place that ``parts`` lead to from ``base``, and then put it there. Folders that do not
    exist are created. Return what ``fill`` and ``place`` returned.

    ``fill`` writes the content to the file descriptor of an empty file. It may be called several times. ``place`` puts
    the file to its place in one step, and returns whether it did. The place never holds a part of the content, also
    after a crash. What was put there is on the disk when the function returns.
    """
    for _ in range(TRIES - 1):
        # The error means that somebody else has deleted the folder, which was empty, or the unfinished file.
        with contextlib.suppress(FileNotFoundError):
            return _try_to_put(base, parts, fill, place)
    return _try_to_put(base, parts, fill, place)


def _try_to_put(
    base: Path, parts: Sequence[str], fill: Callable[[int], T], place: Callable[[Placing], bool]
) -> tuple[T, bool]:
    with opened_folder(base, parts[:-1], create=True) as folder:
        assert folder is not None
        partial = f"{PARTIAL}{secrets.token_hex(8)}"
        file = os.open(partial, _NEW_FILE, FILE_MODE, dir_fd=folder)
        try:
            try:
                filled = fill(file)
                os.fsync(file)
            finally:
                os.close(file)
            is_placed = place(Placing(partial, parts[-1], folder))
        finally:
            # After a rename there is no such file. Where the deletion fails, `abort_multipart_uploads` of a later run
            # deletes the file.
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)
        # An earlier try may have put the file there, and failed here. So this is also done where nothing was placed.
        sync_folder(folder)
        return filled, is_placed


def write_all(file: int, data: bytes) -> None:
    """Write all bytes of ``data`` to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync_folder(folder: int) -> None:
    """Wait until changes of names in a folder have reached the disk. Some network file systems refuse this request for
    a folder, and send each change to the server at once."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def delete_files(base: Path, parts: Sequence[str], names: Sequence[str]) -> None:
    """Delete files in the folder that ``parts`` lead to from ``base``. A file that does not exist is no error. If the
    folder is empty afterwards, delete it and the empty folders above it, but not ``base``."""
    with opened_folder(base, parts) as folder:
        if folder is None:
            return
        for name in names:
            try:
                os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            except OSError:
                # A folder has no key of its own, so there is no object to delete.
                if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise
        sync_folder(folder)
    for count in range(len(parts), 0, -1):
        with opened_folder(base, parts[: count - 1]) as folder:
            try:
                if folder is not None:
                    os.rmdir(parts[count - 1], dir_fd=folder)
            except FileNotFoundError:
                pass
            except OSError:
                # Mostly the folder is not empty. An empty folder does no harm, so another error does not matter.
                return
