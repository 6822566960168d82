"""Keeps prepared examples in a folder, so that they are made once: token ids, ranges of supervised tokens, origins of
the examples, and notices. The first rank of a node calls `obtain_examples`, and then all ranks of the node map the same
files with `load_examples`. A folder on a volume that other pods share saves the work for later attempts and jobs too.

A folder is written under a name of its own, and gets the name of its identity by one rename, so that several writers
do not harm each other. Nothing in the folder of a volume is believed: it is copied to the node, and counts only if the
copied bytes have the digests in its seal, and the seal the right key. Whatever is damaged is made again.

Nothing in the product calls this module yet.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune_trainer.data.examples import ARRAYS, ROWS_FILE, ExampleSet
from finetune_trainer.data.prepared.prepared_rows import Origins, PreparedRows
from finetune_trainer.pod.errors import OutsideFailure, first_line

SEAL_FILE = "seal.json"
NOTES_FILE = "notes.json"
ORIGIN_ARRAYS = ("origin_file", "origin_number")
FILES = (*(f"{name}.npy" for name in (*ARRAYS, *ORIGIN_ARRAYS)), ROWS_FILE, NOTES_FILE)
"""All files of a folder but the seal."""
LONGEST_SEAL = 64 * 1024
COPY_BYTES = 4 << 20
FREE_SHARE, MOST_FREE_BYTES = 0.05, 10 << 30
"""Share of a volume that is left free for other files, and the largest number of bytes that is left free."""
LEFTOVER_SECONDS = 24 * 3600
"""An unfinished folder counts as left by a pod that died if the newest folder is that many seconds younger."""
_UNFINISHED = ".unfinished-"
_IDENTITY = re.compile(r"[0-9a-f]{64}")


class DamagedExamples(Exception):  # noqa: N818  (the files are at fault)
    """A folder does not hold what was written into it, as a phrase that follows the folder's name."""


@dataclass(frozen=True)
class Obtained:
    """Where prepared examples came from."""

    prepared: PreparedRows
    from_cache: bool
    """Whether the examples were made earlier. False if they were made now."""
    trouble: str = ""
    """Why examples that were made earlier could not be used, or why the examples could not be kept for later. Empty if
    nothing went wrong."""


def obtain_examples(
    identity: str | None,
    make: Callable[[], PreparedRows],
    target: Path,
    *,
    cache: Path | None = None,
    key: bytes = b"",
) -> Obtained:
    """Put the examples with the identity ``identity`` into the folder ``target``, and return them, mapped from there.

    They are copied from the folder ``cache``, which need not exist, or made by ``make``, and then kept in ``cache`` for
    later. Without ``cache``, or if ``identity`` is None, they are made. ``key`` is a secret that all pods know which
    may use each other's examples. Without it, the seal only shows damage, and anybody who can write to ``cache`` can
    put other examples there. If ``target`` exists, it is replaced.

    Raises OutsideFailure if ``target`` can't be written, and whatever ``make`` raises. Trouble with ``cache`` is no
    error.
    """
    trouble = ""
    kept = cache / identity if cache is not None and identity is not None else None
    if kept is not None and identity is not None:
        try:
            if _copied(kept, target, identity, key):
                return Obtained(load_examples(target), from_cache=True)
        except DamagedExamples as error:
            trouble = f"the examples in {kept} {error}: they are made again"
        except OSError as error:
            trouble = f"{kept} can't be read ({error.strerror}): the examples are made again"
    prepared = make()
    try:
        _replace(target, lambda folder: write_examples(prepared, folder, identity or "", key))
    except OSError as error:
        raise OutsideFailure(f"the examples can't be written to {target.parent}: {error.strerror}") from error
    if kept is not None:
        try:
            _keep(target, kept, replace=bool(trouble))
        except OSError as error:
            trouble = f"{kept} can't be written ({error.strerror}): the examples are not kept"
    return Obtained(load_examples(target), from_cache=False, trouble=trouble)


def load_examples(folder: Path) -> PreparedRows:
    """Return the examples in a folder that `obtain_examples` has written, as arrays that are mapped from its files.
    Nothing is verified, because `obtain_examples` has done so."""
    notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
    file, number = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ORIGIN_ARRAYS)
    origins = Origins(notes["files"], file, number)
    return PreparedRows(ExampleSet.load(folder), notes["notices"], notes["rows"], origins)


def write_examples(prepared: PreparedRows, folder: Path, identity: str, key: bytes = b"") -> None:
    """Write examples into the existing folder ``folder``, and seal them."""
    prepared.examples.save(folder)
    for name, values in zip(ORIGIN_ARRAYS, (prepared.origins.file, prepared.origins.number), strict=True):
        np.save(folder / f"{name}.npy", values)
    notes = {"notices": prepared.notices, "rows": prepared.rows, "files": list(prepared.origins.files)}
    (folder / NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")
    files = {}
    for name in FILES:
        size = (folder / name).stat().st_size
        files[name] = [size, _copied_digest(folder / name, None, size)]
    content = json.dumps({"identity": identity, "files": files}, sort_keys=True)
    (folder / SEAL_FILE).write_text(json.dumps({"content": content, "mac": _mac(content, key)}), encoding="utf-8")


def _mac(content: str, key: bytes) -> str:
    return hmac.digest(key, content.encode(), "sha256").hex()


def _sealed_files(folder: Path, identity: str, key: bytes) -> dict[str, tuple[int, str]] | None:
    """Return size and sha256 of each file of a folder by the name of the file, or None if there is no folder. Raises
    DamagedExamples if the seal is not the one of a folder with this identity and key."""
    try:
        with _opened(folder / SEAL_FILE) as file:
            found = file.read(LONGEST_SEAL)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(folder):
            raise DamagedExamples("have no seal") from None
        return None
    try:
        seal = json.loads(found)
        content, mac = str(seal["content"]), str(seal["mac"])
        if not hmac.compare_digest(_mac(content, key).encode(), mac.encode()):
            raise DamagedExamples("have another seal")
        sealed = json.loads(content)
        files = {name: (int(sealed["files"][name][0]), str(sealed["files"][name][1])) for name in FILES}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedExamples(f"have a seal that can't be read ({first_line(error)})") from None
    if sealed["identity"] != identity:
        raise DamagedExamples("have the seal of other examples")
    return files


def _copied(kept: Path, target: Path, identity: str, key: bytes) -> bool:
    """Copy the folder ``kept`` to ``target``, and return whether there is such a folder. Raises DamagedExamples if it
    does not hold what its seal says, and OutsideFailure if ``target`` can't be written."""
    files = _sealed_files(kept, identity, key)
    if files is None:
        return False

    def copy(folder: Path) -> None:
        for name, (size, digest) in files.items():
            try:
                found = _copied_digest(kept / name, folder / name, size)
            except FileNotFoundError:
                raise DamagedExamples(f"have no {name}") from None
            if found != digest:
                raise DamagedExamples(f"have a changed {name}")
        shutil.copyfile(kept / SEAL_FILE, folder / SEAL_FILE)

    _replace(target, copy)
    with contextlib.suppress(OSError):
        os.utime(kept)  # the time of the last use
    return True


def _copied_digest(source: Path, target: Path | None, size: int) -> str:
    """Return the sha256 of a file of ``size`` bytes, and copy it to ``target`` if that is not None. Return an empty
    text if the file has another size. Not more is copied, because another writer may let a file grow without end."""
    sha256, left = hashlib.sha256(), size
    with _opened(source) as file, contextlib.ExitStack() as stack:
        copy = stack.enter_context(target.open("wb")) if target is not None else None
        while chunk := file.read(min(COPY_BYTES, left + 1)):
            left -= len(chunk)
            if left < 0:
                return ""
            sha256.update(chunk)
            if copy is not None:
                copy.write(chunk)
    return sha256.hexdigest() if left == 0 else ""


def _opened(path: Path) -> BinaryIO:
    """Open a file that somebody else may have made. A link is not followed, and a named pipe does not hold this process
    up. Raises DamagedExamples if it is no plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedExamples(f"have a {path.name} that is no file")
    return os.fdopen(descriptor, "rb")


def _keep(made: Path, kept: Path, *, replace: bool) -> None:
    """Copy the folder ``made`` to ``kept``. If another pod has put a folder there meanwhile, it stays, unless
    ``replace`` is set, because the folder that is there is damaged. Raises OSError with ENOSPC if there is no room."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    _make_room(kept.parent, _bytes_of(made))
    unfinished = kept.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    try:
        shutil.copytree(made, unfinished)
        if replace:
            _remove(kept)
        with contextlib.suppress(FileExistsError):
            _rename(unfinished, kept)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_room(cache: Path, size: int) -> None:
    """Remove what pods that died have left, and then the examples that were not used for the longest time, until there
    is room for ``size`` bytes. Raises OSError with ENOSPC if there can't be enough room."""
    entries: list[tuple[float, Path]] = []
    for entry in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):
            entries.append((entry.lstat().st_mtime, entry))
    newest = max((changed for changed, _ in entries), default=0.0)
    for changed, entry in sorted(entries):
        if entry.name.startswith(_UNFINISHED):
            if changed < newest - LEFTOVER_SECONDS:
                _remove(entry)
        elif _missing_bytes(cache, size) > 0 and _IDENTITY.fullmatch(entry.name):
            _remove(entry)
    if _missing_bytes(cache, size) > 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _missing_bytes(cache: Path, size: int) -> int:
    """Return how many bytes must become free before ``size`` bytes can be written and FREE_SHARE still is free."""
    volume = os.statvfs(cache)
    free, total = volume.f_bavail * volume.f_frsize, volume.f_blocks * volume.f_frsize
    return size + min(int(FREE_SHARE * total), MOST_FREE_BYTES) - free


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, and put the folder at ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    unfinished.mkdir()
    try:
        write(unfinished)
        _remove(target)
        _rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove whatever is at ``folder``. It loses its name first, so that nobody sees a part of it."""
    doomed = folder.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)


def _rename(folder: Path, name: Path) -> None:
    """Give ``folder`` its name. Raises FileExistsError if a folder with files has the name already."""
    try:
        folder.rename(name)
    except OSError as error:
        if name.is_dir():
            raise FileExistsError(error.errno, error.strerror) from error
        raise
