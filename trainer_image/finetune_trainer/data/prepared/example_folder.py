"""Puts prepared examples into a folder of the node: token ids, ranges of supervised tokens, origins of the examples,
and notices. `node_examples.py` calls `obtain_examples` on the first rank of a node, and then all ranks of the node map
the same files. A volume that other pods share saves the work for later attempts and jobs (`example_cache.py`).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_trainer.data.examples import ARRAYS, ROWS_FILE, ExampleSet
from finetune_trainer.data.prepared.example_cache import DamagedExamples, ExampleCache, writing_examples
from finetune_trainer.data.prepared.prepared_rows import Origins, PreparedRows
from finetune_trainer.pod.errors import reason_of

NOTES_FILE = "notes.json"
ORIGIN_ARRAYS = ("origin_file", "origin_number")
FILES = (*(f"{name}.npy" for name in (*ARRAYS, *ORIGIN_ARRAYS)), ROWS_FILE, NOTES_FILE)
"""All files of a folder."""
_UNFINISHED = ".unfinished-"


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
    is_unchanged: Callable[[], bool] = lambda: True,
) -> Obtained:
    """Put the examples with the identity ``identity`` into the folder ``target``, and return them, mapped from there.

    They are copied from the volume that is mounted at ``cache``, or made by ``make`` and then kept on the volume for
    later. Without ``cache``, or if it is no folder, or if ``identity`` is None, they are made. ``key`` is a secret that
    all pods know which may use each other's examples. Pods with another key keep examples of their own. Without a key,
    the seal only shows damage, and whoever has access to the volume can read the examples and put others there.
    ``is_unchanged`` is called after ``make``, and returns whether the data still have the identity ``identity``. If
    not, ``make`` may have read other data, and its examples are not kept. If ``target`` exists, it is replaced.

    Raises OutsideFailure if ``target`` can't be written or read, and whatever ``make`` raises. Trouble with the volume
    is no error.
    """
    trouble, opened = "", None
    if cache is not None and identity is not None:
        try:
            opened = ExampleCache(cache, key) if cache.is_dir() else None
        except OSError as error:
            trouble = f"the volume at {cache} can't be used ({reason_of(error)}): the examples are not kept"
    if opened is None or identity is None:
        return Obtained(_made(make, target), from_cache=False, trouble=trouble)
    with opened:
        try:
            if _copied(opened, identity, target):
                return Obtained(load_examples(target), from_cache=True)
        except DamagedExamples as error:
            trouble = f"the examples {identity} on the volume at {cache} {error}: they are made again"
        except OSError as error:
            trouble = f"the volume at {cache} can't be read ({reason_of(error)}): the examples are made again"
        prepared = _made(make, target)
        if not is_unchanged():
            trouble = "the data changed while the examples were made: the examples are not kept"
            return Obtained(prepared, from_cache=False, trouble=trouble)
        try:
            opened.copy_in(identity, FILES, target)
        except OSError as error:
            trouble = f"the volume at {cache} can't be written to ({reason_of(error)}): the examples are not kept"
        return Obtained(prepared, from_cache=False, trouble=trouble)


def load_examples(folder: Path) -> PreparedRows:
    """Return the examples in a folder that `obtain_examples` has written, as arrays that are mapped from its files.
    Nothing is verified, because `obtain_examples` has done so."""
    notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
    file, number = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ORIGIN_ARRAYS)
    origins = Origins(notes["files"], file, number)
    return PreparedRows(ExampleSet.load(folder), notes["notices"], notes["rows"], origins)


def write_examples(prepared: PreparedRows, folder: Path) -> None:
    """Write examples into the existing folder ``folder``."""
    prepared.examples.save(folder)
    for name, values in zip(ORIGIN_ARRAYS, (prepared.origins.file, prepared.origins.number), strict=True):
        np.save(folder / f"{name}.npy", values)
    notes = {"notices": prepared.notices, "rows": prepared.rows, "files": list(prepared.origins.files)}
    (folder / NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")


def _made(make: Callable[[], PreparedRows], target: Path) -> PreparedRows:
    """Return the examples that ``make`` makes, after they were put into ``target``."""
    with _unfinished(target) as folder:
        prepared = make()
        with writing_examples(target):
            write_examples(prepared, folder)
            _replace(target, folder)
    return load_examples(target)


def _copied(cache: ExampleCache, identity: str, target: Path) -> bool:
    """Copy the examples to ``target``, and return whether the cache has them. Raises the errors of
    `ExampleCache.copy_out`."""
    with _unfinished(target) as folder:
        if not cache.copy_out(identity, FILES, folder):
            return False
        with writing_examples(target):
            _replace(target, folder)
    return True


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``, which is gone at the end of the `with` block."""
    folder = target.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    with writing_examples(target):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(target: Path, folder: Path) -> None:
    """Rename ``folder`` to ``target``, and remove what was there."""
    with contextlib.suppress(FileNotFoundError):
        former = target.rename(target.parent / f"{_UNFINISHED}{secrets.token_hex(8)}")
        shutil.rmtree(former, ignore_errors=True)
    folder.rename(target)
