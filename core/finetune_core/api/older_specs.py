"""Reads specs that an older version of the CRD accepted and in which a field had another type.

The API server does not convert stored objects of the same API version. So after an upgrade it returns a job as the
older version stored the job, and this version has to understand the older type. A test compares the types of all fields
with those of older CRDs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _task(stored: Any) -> Any:
    """Return ``stored``, the value of `dataset.task`, in the type of this version. Older versions stored the name of a
    task, or the text `None` for no task."""
    if not isinstance(stored, str):
        return stored
    return None if stored == "None" else {"name": stored}


OTHER_TYPES: Mapping[str, Callable[[Any], Any]] = {"dataset.task": _task}
"""For each field that had another type, by its path in the spec: a function that returns the stored value in the type
of this version. A value that already has this type is returned unchanged. None is returned where the field is to be
left out."""


def present_manifest(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``stored``, the manifest of a FineTuneJob as the API server returned it, with the fields of its spec in
    the types of this version. ``stored`` itself is not changed."""
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
