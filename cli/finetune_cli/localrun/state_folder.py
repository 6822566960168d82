"""The files of `finetune run` beside the runs themselves: the run file, the log, temporary files, and the lock that
keeps a second run of the same job out.

They lie in `<store>/.finetune/<namespace>/<name>/<runId>/`. No bucket has a name that begins with a dot, so the folder
is never taken for one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_core.errors import UserError

STATE = ".finetune"
"""Name of the folder, directly in the store, with the files of `finetune run`."""


@dataclass(frozen=True, slots=True)
class StateFolder:
    """The paths of the files."""

    path: Path

    @property
    def lock_file(self) -> Path:
        """The file that a run locks."""
        return self.path / "lock"

    @property
    def run_file(self) -> Path:
        """The run file of the newest start."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """What the trainer wrote, over all starts."""
        return self.path / "trainer.log"

    @property
    def scratch(self) -> Path:
        """Temporary files of the trainer. The folder is empty between two runs."""
        return self.path / "scratch"

    @property
    def secrets(self) -> Path:
        """Tokens, which only this user may read. The folder is deleted when a run ends."""
        return self.path / "secrets"

    @property
    def volumes(self) -> Path:
        """Links to the folders that take the place of volumes."""
        return self.path / "volumes"

    @property
    def result(self) -> Path:
        """How the newest start ended, as the trainer wrote it."""
        return self.path / "result.json"

    def prepare(self, volumes: Mapping[str, Path]) -> None:
        """Make the folders anew, and a link for each item of ``volumes``. The caller holds the lock."""
        for folder in (self.scratch, self.secrets, self.volumes):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        for name, folder in volumes.items():
            (self.volumes / name).symlink_to(folder)
        self.result.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete what only a running training needs. The caller holds the lock."""
        for folder in (self.scratch, self.secrets, self.volumes):
            shutil.rmtree(folder, ignore_errors=True)


def state_folder(store: Path, namespace: str, name: str, run_id: str) -> StateFolder:
    """Return the folder of a job in ``store``, and create it where it does not exist. Raises UserError where that is
    not possible."""
    folder = store / STATE / namespace / name / run_id
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--store", f"must be a folder that you may write to: {folder}: {error.strerror}") from None
    return StateFolder(folder)


@contextmanager
def locked(folder: StateFolder, job: str) -> Iterator[int]:
    """Hold the lock of ``folder`` while the block runs, and yield its file descriptor.

    The descriptor is given to the trainer too, so the lock is held until both have ended, also where this process was
    killed. Raises UserError at once where another process holds the lock. ``job`` is how the sentence names the job.
    """
    descriptor = os.open(folder.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError("--store", f"{folder.lock_file} can't be locked: {error.strerror}") from None
            raise UserError(
                job,
                "is being trained by another `finetune run` with this store: wait for it or stop it with Ctrl-C; a"
                f" second run needs another --store or another metadata.name ({folder.path})",
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
