"""Chooses the data files of a source among the paths that a bucket, a volume or a repository holds. The functions know
only paths, so a folder or a glob means the same in all three.

Paths are relative to the root of the bucket, volume or repository, with `/` between their parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fsspec.utils import glob_translate

from finetune_core.errors import UserError
from finetune_trainer.data.files.kinds import KINDS_TEXT, kind_of

MOST_FILES = 10_000
"""Largest number of data files of one source."""
_WILDCARD = re.compile(r"[*?\[]")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
"""Names of files that describe a data set and hold no rows. The library `datasets` leaves them out too."""


class Selection(NamedTuple):
    """The chosen paths in their order, and sentences about paths that were left out."""

    paths: list[str]
    notices: list[str]


def is_glob(path: str) -> bool:
    """Return whether ``path`` has one of the characters that have a meaning in a glob."""
    return _WILDCARD.search(path) is not None


def literal_prefix(glob: str) -> str:
    """Return the part of ``glob`` before its first wildcard. All paths that match begin with this part."""
    return _WILDCARD.split(glob, maxsplit=1)[0]


def matching(paths: Sequence[str], glob: str, field: str) -> list[str]:
    """Return those of ``paths`` that match ``glob``, as fsspec understands it: `*` and `?` stay within a part of the
    path, and `**` stands for any number of parts, including none. ``field`` is the path of the glob's field in the
    spec.

    A part of a path that begins with `.` or `_` matches only a part of the glob that begins with `.` or `_` too. Raises
    UserError for a malformed glob.
    """
    try:
        expression = re.compile(glob_translate(glob))
    except (ValueError, re.error) as error:
        raise UserError(field, f"has a malformed glob {glob!r}: {error}") from None
    hidden = _hidden_parts(glob)
    return [path for path in paths if _hidden_parts(path) == hidden and expression.match(path)]


def may_match_below(folder: str, glob: str) -> bool:
    """Return whether a file in ``folder``, at any depth, may match ``glob``. A search for files that match can leave
    out each folder for which this function returns False."""
    parts = [part for part in glob.split("/") if part]
    if _hidden_parts(folder) > _hidden_parts(glob):
        return False
    for number, name in enumerate(folder.split("/")):
        if number < len(parts) and parts[number] == "**":
            return True
        try:
            if number >= len(parts) - 1 or not re.match(glob_translate(parts[number]), name):
                return False
        except (ValueError, re.error):
            return True  # `matching` says what is wrong with the glob
    return True


def chosen(paths: Sequence[str], path: str, field: str, where: str) -> Selection:
    """Return the data files among ``paths`` in the folder ``path``, or those that match the glob ``path`` if there is
    no such folder. An empty ``path`` is the root. Call this only if no file has exactly the path ``path``.

    ``field`` is the path of the source's field in the spec, and ``where`` names the folder or glob in messages. Raises
    UserError as `select` does. If no data file is found, the message names files near ``path``.
    """
    inside = [name for name in paths if not path or name.startswith(f"{path}/")]
    found = below(paths, path) if inside or not is_glob(path) else matching(paths, path, field)
    if found:
        return select(found, field, where)
    start = literal_prefix(path).rpartition("/")[0]
    near = [name for name in inside or paths if name.startswith(start) and not name.endswith("/")]
    seen = f"; near it lie {shown(*near[:3])}" if near else ""
    hidden = any(_hidden_parts(name) > _hidden_parts(path) for name in near)
    why = " (names that begin with `.` or `_` are left out unless the glob names them so)" if hidden else ""
    raise UserError(field, f"there is no data file at {where}{seen}{why}")


def shown(*paths: str) -> str:
    """Return ``paths`` as text for a message. Line breaks and other control characters in a name are escaped, and so
    are bytes that are no UTF-8, which a name on a volume may hold."""
    return ", ".join("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in path) for path in paths)


def below(paths: Sequence[str], folder: str) -> list[str]:
    """Return those of ``paths`` that lie in ``folder``, at any depth. A file is left out if a part of its path below
    ``folder`` begins with `.` or `_`. An empty ``folder`` is the root."""
    start = f"{folder}/" if folder else ""
    return [path for path in paths if path.startswith(start) and not _hidden_parts(path[len(start) :])]


def select(paths: Sequence[str], field: str, where: str) -> Selection:
    """Return the data files among ``paths``, ordered by path, and a notice about files that are no data files.
    ``where`` names the folder or glob in messages, for example `s3://bucket/rows`.

    Raises UserError if there is no data file, if there are too many, if they are of several kinds, or if the names of
    two of them differ only in the suffix of the compression.
    """
    named = [path for path in sorted(set(paths)) if path and not path.endswith("/")]
    found, others = {}, []
    for path in named:
        kind = kind_of(path)
        if kind is None or path.rpartition("/")[2].lower() in METADATA:
            others.append(path)
        else:
            found[path] = kind
    if not found:
        seen = f"; it holds {shown(*others[:3])}" if others else ""
        raise UserError(field, f"there is no data file at {where}{seen}: the suffix must be {KINDS_TEXT}")
    if len(found) > MOST_FILES:
        raise UserError(field, f"{where} has {len(found)} data files, more than {MOST_FILES}")
    examples = {kind.kind: path for path, kind in reversed(found.items())}
    if len(examples) > 1:
        seen = shown(*sorted(examples.values()))
        raise UserError(field, f"{where} must have data files of one kind, and has {seen}: a glob can name one kind")
    by_stem: dict[str, str] = {}
    for path, kind in found.items():
        other = by_stem.setdefault(kind.stem, path)
        if other != path:
            raise UserError(
                field, f"{where} has {shown(other)} and {shown(path)}, which seem to be the same rows twice"
            )
    return Selection(list(found), [_left_out(others, field, where)] if others else [])


def _left_out(paths: Sequence[str], field: str, where: str) -> str:
    files = f"{len(paths)} files that are no data files are" if len(paths) > 1 else "a file that is no data file is"
    return f"{field}: {files} left out of {where}: {shown(*paths[:3])}"


def _hidden_parts(path: str) -> int:
    """Return how many parts of ``path`` begin with `.` or `_`. Programs give such names to files that hold no rows, for
    example `_SUCCESS` and `.part-0.crc`."""
    return sum(part.startswith((".", "_")) for part in path.split("/"))
