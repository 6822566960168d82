"""Reads specs that an older version of the CRD accepted and in which a field had another type.

The API server does not convert stored objects of the same API version. So after an upgrade it returns a job as the
older version stored the job, and this version has to understand the older type. A test compares the types of all fields
with those of older CRDs. `tolerant_rules.py` makes the rules of the CRD hold for such jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _task(stored: Any) -> Any:
    """Return `dataset.task`, which was the name of a task or `None` (the default)."""
    if not isinstance(stored, str):
        return stored
    return None if stored == "None" else {"name": stored}


OTHER_TYPES: Mapping[str, Callable[[Any], Any]] = {"dataset.task": _task}
"""For the path in the spec of each field that had another type: a function that returns the value as this version's
type. The function returns a value of this version unchanged, and None where the field is to be absent."""


def present_manifest(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a FineTuneJob with the fields of its spec in the types of this version. ``stored`` is not
    changed."""
    manifest = dict(stored)
    for path, convert in OTHER_TYPES.items():
        *parents, name = ["spec", *path.split(".")]
        section: Any = manifest
        for parent in parents:
            inner = section.get(parent)
            if not isinstance(inner, dict):
                break
            # The section is copied, because ``stored`` may be shared with other readers.
            section[parent] = dict(inner)
            section = section[parent]
        else:
            if name in section and (value := convert(section[name])) is not None:
                section[name] = value
            else:
                section.pop(name, None)
    return manifest
