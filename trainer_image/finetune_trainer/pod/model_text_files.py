"""Reads the small files of a model's folder that are JSON, such as `config.json` and `tokenizer_config.json`.

transformers reads these files itself. They are read here first, because transformers' messages about a file that is no
JSON name a path in the pod, or no file at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer.pod.errors import first_line

LFS_POINTER = b"version https://git-lfs"
"""The beginning of a pointer of Git LFS: a short text that lies in a repository in place of a file."""


def pointer_problem(name: str, content: bytes) -> str:
    """Return a sentence that says what is wrong where the file ``name`` is a pointer of Git LFS, else an empty text.
    ``content`` is the beginning of the file, or the whole file."""
    if not content.startswith(LFS_POINTER):
        return ""
    return f"{name} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`"


def check_no_pointer(path: Path) -> None:
    """Raise ValueError if the file ``path`` is a pointer of Git LFS. Only the beginning of the file is read."""
    if path.is_file():
        with path.open("rb") as file:
            if problem := pointer_problem(path.name, file.read(len(LFS_POINTER))):
                raise ValueError(problem)


def check_begins_object(path: Path) -> None:
    """Raise ValueError if the file ``path`` does not begin like a JSON object. Only the beginning of the file is read,
    because the file may be large."""
    if path.is_file():
        with path.open("rb") as file:
            if not file.read(1000).lstrip(b" \t\r\n").startswith(b"{"):
                raise ValueError(f"{path.name} must be a JSON object")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file ``path``. Return an empty object if there is no such file. Raises ValueError
    with a sentence that names the file if the file has no JSON object in UTF-8, which is what transformers reads."""
    if not path.is_file():
        return {}
    check_no_pointer(path)
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be a JSON object in UTF-8 ({first_line(error)})") from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(found), "a number")
        raise ValueError(f"{path.name} must be a JSON object, and holds {kind}")  # noqa: TRY004  (the caller's data)
    return found
