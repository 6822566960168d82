"""Fills in the defaults that a schema has, as the API server does.

`validate_job.py` calls `defaulted` for a spec that the pydantic models refuse, and then checks the CEL rules of those
sections of the spec that have no structural problem.
"""

from __future__ import annotations

import copy
from typing import Any


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """Return ``value`` with the defaults of ``schema`` for absent fields. A field whose value is null counts as
    absent."""
    if isinstance(value, dict) and "properties" in schema:
        filled = {key: item for key, item in value.items() if item is not None}
        for name, child in schema["properties"].items():
            if name not in filled and "default" in child:
                filled[name] = copy.deepcopy(child["default"])
            if name in filled:
                filled[name] = defaulted(child, filled[name])
        return filled
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    if isinstance(value, list) and "items" in schema:
        return [defaulted(schema["items"], item) for item in value]
    return value
