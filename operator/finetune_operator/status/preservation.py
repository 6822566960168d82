"""Keeps, as they are stored, those parts of a status that this version of the operator does not know or did not change.

Another version may have written the status, with fields, values and lengths that this version does not know. The
functions are pure; `writer.py` calls them right before it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_core.api.conditions import ConditionType
from finetune_operator.kube.manifest import Manifest

Json = Any
"""A value as JSON holds it."""


def preserve(manifest: Manifest, read: Manifest, new: Manifest, manager: str) -> Manifest:
    """Return the status to apply as the field manager ``manager``.

    ``manifest`` is the stored FineTuneJob, whose status is replaced. ``read`` is what this version has read of that
    status, and ``new`` is what the status is to be. What is equal in ``read`` and ``new`` stays as it is stored.

    The result leaves out a condition if this version does not know its type and ``manager`` does not own the condition.
    Server-side apply keeps such a condition for its owner. If ``manager`` applied the condition as well, the owner
    could no longer remove it alone.
    """
    stored: Manifest = manifest.get("status") or {}
    owned = _owned_conditions(manifest, manager) | set(ConditionType)
    others = [{key: value for key, value in status.items() if key != "conditions"} for status in (stored, read, new)]
    result: Manifest = _merged(others[0], others[1], others[2])
    conditions = [[item for item in _items(status) if item["type"] in owned] for status in (stored, read, new)]
    result["conditions"] = _merged_conditions(conditions[0], conditions[1], conditions[2])
    return result


def _merged(stored: Json, read: Json, new: Json) -> Json:
    """Return ``stored`` where ``read`` and ``new`` are equal, else ``new``. JSON objects are merged field by field.

    ``stored`` is what the API server has, ``read`` is what this version has read of it, and ``new`` is the new value.
    Where ``stored`` is None, the API server has nothing, and ``new`` is returned.
    """
    if new == read:
        return new if stored is None else stored
    if not (isinstance(stored, dict) and isinstance(read, dict) and isinstance(new, dict)):
        return new
    result = {key: _merged(stored.get(key), read.get(key), value) for key, value in new.items()}
    # Fields that this version can't read are kept; fields that it could read but no longer wants are not.
    return result | {key: value for key, value in stored.items() if key not in new and key not in read}


def _merged_conditions(stored: Sequence[Json], read: Sequence[Json], new: Sequence[Json]) -> list[Json]:
    stored_by_type = {item["type"]: item for item in stored}
    read_by_type = {item["type"]: item for item in read}
    known = {item["type"] for item in new}
    merged = [_merged(stored_by_type.get(item["type"]), read_by_type.get(item["type"]), item) for item in new]
    return merged + [item for item in stored if item["type"] not in known]


def _items(status: Mapping[str, Any]) -> list[Json]:
    """Return the conditions of ``status``; leave out anything that is no object with a type."""
    items = status.get("conditions")
    known = items if isinstance(items, list) else []
    return [item for item in known if isinstance(item, dict) and isinstance(item.get("type"), str)]


def _owned_conditions(manifest: Manifest, manager: str) -> set[str]:
    """Return the types of the conditions that ``manager`` owns by `metadata.managedFields`."""
    owned: set[str] = set()
    for entry in manifest["metadata"].get("managedFields") or ():
        if entry.get("manager") == manager and entry.get("subresource") == "status":
            keys = entry.get("fieldsV1", {}).get("f:status", {}).get("f:conditions", {})
            owned |= {key.removeprefix('k:{"type":"').removesuffix('"}') for key in keys if key.startswith("k:")}
    return owned
