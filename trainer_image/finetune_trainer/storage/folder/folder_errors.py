"""Turns the errors of the file system below a folder store into `RequestFailedError`, which `retries.py` handles."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.pod.errors import Damaged, reason_of
from finetune_trainer.storage.retries import RequestFailedError

REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""Errors that say that this process may not read or write. They are the counterpart of refused credentials."""
IMPOSSIBLE = frozenset(
    {errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EXDEV}
)
"""Errors that name a request that this file system can't fulfil. All other errors, such as a full disk or an error of
the disk, may pass."""
NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
"""Errors with which a file system without hard links answers `link`."""


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError in the `with` block into RequestFailedError. ``doing`` says what could not be done to ``path``,
    for example "written"."""
    try:
        yield
    except OSError as error:
        who = f" by user {os.getuid()}" if error.errno in REFUSALS else ""
        raise RequestFailedError(
            f"storage.folder: {path} can't be {doing}{who} ({reason_of(error)})",
            final=error.errno in REFUSALS | IMPOSSIBLE,
        ) from error


def missing_folder(folder: Path) -> RequestFailedError:
    """Return the error about a store whose folder does not exist. The folder is never made here, because it may be the
    mount point of a disk that is not mounted now."""
    return RequestFailedError(f"storage.folder: there is no folder {folder}", final=True)


def no_hard_links(folder: Path, error: OSError) -> RequestFailedError:
    """Return the error about a file system without hard links."""
    return RequestFailedError(
        f"storage.folder: the file system of {folder} has no hard links ({reason_of(error)}), by which two runs at the"
        " same time are kept apart; name a folder on another file system, such as ext4, XFS, Btrfs or NFS",
        final=True,
    )


def foreign_entry(path: Path, kind: str) -> Damaged:
    """Return the error about something in the store that no store has put there, such as a symbolic link."""
    return Damaged(f"storage.folder: {path} is {kind}, and a store holds only folders and files")
