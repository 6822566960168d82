"""Access to the files of a mounted volume. A path that leads out of the volume is refused, even if it does so by a
symbolic link. Every error of the file system becomes OutsideFailure with a sentence that names the volume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.sources.file_selection import matching, may_match_below, shown

T = TypeVar("T")


class VolumeFolder:
    """A mounted volume."""

    def __init__(self, base: Path, claim: str, field: str) -> None:
        """Use the volume of the claim ``claim``, which is mounted at ``base``. ``field`` is the path of the source's
        field in the spec, for example `dataset.train.volume.path`."""
        self._base, self._claim, self._field = base, claim, field

    def path(self, path: str) -> Path:
        """Return the local path of ``path``, which is relative to the volume. Raises UserError if ``path`` leads out of
        the volume."""
        local = self._base / path

        def inside(local: Path) -> bool:
            return local.resolve().is_relative_to(self._base.resolve())

        if not self._try(path, lambda: inside(local)):
            raise UserError(self._field, "must not lead out of the volume")
        return local

    def is_file(self, path: str) -> bool:
        """Return whether ``path`` is a file, or a link to one."""
        return self.reading(path, lambda local: local.is_file())

    def is_folder(self, path: str) -> bool:
        """Return whether ``path`` is a folder, or a link to one."""
        return self.reading(path, lambda local: local.is_dir())

    def bytes(self, path: str) -> int:
        """Return the size of a file in bytes."""
        return self.reading(path, lambda local: local.stat().st_size)

    def reading(self, path: str, read: Callable[[Path], T]) -> T:
        """Call ``read`` with the local path of ``path`` and return its result. Raises OutsideFailure if the file system
        raises an error."""
        local = self.path(path)
        return self._try(path, lambda: read(local))

    def list_files(self, folder: str, *, most: int, glob: str | None = None) -> list[str]:
        """Return the paths of the files in ``folder``, at any depth, relative to the volume. Folders and links for
        which `_is_left_out` returns True are left out. With ``glob``, a folder is opened only if a file in it may
        match, because the pod may not be allowed to read the other folders.

        Raises UserError if there are more than ``most`` files, or if a link that is not left out leads to no file.
        """
        found: list[str] = []
        for path in self._walk("" if folder == "." else folder, glob):
            found.append(path)
            if len(found) > most:
                raise UserError(self._field, f"more than {most} files lie in {folder!r}: name a folder with fewer")
        return found

    def _walk(self, folder: str, glob: str | None) -> Iterator[str]:
        # Links to folders are followed, because the rows in a folder that is left out would silently be missing. Each
        # folder is entered only once, so a circle of links does no harm.
        left, seen = [folder], set()
        while left:
            folder = left.pop()
            status = self.reading(folder, lambda local: local.stat())
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            for name, is_plain_file in self.reading(folder, _entries):
                path = f"{folder}/{name}" if folder else name
                if is_plain_file:
                    yield path
                elif self._is_left_out(path, name, glob):
                    continue
                elif self.is_folder(path):
                    if glob is None or may_match_below(path, glob):
                        left.append(path)
                elif self.is_file(path):
                    yield path
                elif self.reading(path, lambda local: local.is_symlink()):
                    raise UserError(self._field, f"{self._claim}/{shown(path)} is a link to a file that does not exist")

    def _is_left_out(self, path: str, name: str, glob: str | None) -> bool:
        """Return whether a folder or a link is left out without opening it. `lost+found` is always left out, because
        only root may read what a repaired file system keeps there. Without a glob, names that begin with `.` or `_` are
        left out, because they belong to programs. With a glob, a path is left out if neither the path itself nor a path
        below it can match."""
        if glob is None:
            return name.startswith((".", "_")) or name == "lost+found"
        return name == "lost+found" or not (may_match_below(path, glob) or matching([path], glob, self._field))

    def _try(self, path: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except PermissionError as error:
            raise OutsideFailure(
                f"{self._field}: the pod's user {os.getuid()} may not read {path!r} in volume {self._claim!r}"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            # Path.resolve raises RuntimeError for a circle of links, and ValueError for a NUL in a path.
            raise OutsideFailure(f"{self._field}: {path!r} in volume {self._claim!r} can't be read: {error}") from error


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Return the names in a folder, and for each whether it is a file and no link."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_file(follow_symlinks=False)) for entry in entries)
