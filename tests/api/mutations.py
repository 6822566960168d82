"""Mutations of a valid job. A mutation changes one place of the job, such as a field or a list item. The new value is a
mistake that users and generators make, an unusual value, or another allowed value.

Every place gets the same values of many types. The schema of a place determines which further mutations it gets, such
as values at and beyond its bounds. No mutation has the value `2.0` for an integer, for two reasons: kubectl sends 2
instead, and whether the API server accepts 2.0 depends on whether a CEL rule reads the field.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from tests.api.strategies import Schema, SchemaPath


class _Marker:
    """A placeholder for what `json.dumps` can't write: `MISSING` for no value at all, `DEEP_LIST` for a list with too
    many levels."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


MISSING = _Marker("MISSING")
"""Stands for no value: `change` removes the place from the job."""
DEEP_LIST = _Marker("DEEP_LIST")
"""Stands for lists nested 20,000 levels deep. json.dumps fails at this depth, so `to_text` writes the brackets
itself.
"""
MEGABYTE = "x" * 1_000_000
DEPTH = 20_000


def mutations(schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield the name and the new value of each mutation that replaces the whole value at a place. ``schema`` is the
    schema of the place. Most of the new values are wrong or unusual."""
    yield "missing", MISSING
    yield "null", None
    yield "empty string", ""
    yield "empty object", {}
    yield "empty list", []
    yield "a number", 7
    yield "a negative number", -1
    yield "a fraction", 1.5
    yield "a number beyond 64 bits", 1 << 70
    yield "a boolean", True
    yield "a string", "text"
    yield "a string that looks like a number", "7"
    yield "a list of a string", ["text"]
    yield "a list of null", [None]
    yield "an object", {"name": "x"}
    yield "an object with null", {"name": None}
    yield "1 MB", MEGABYTE
    yield "unicode", "ü\u0000\u202e\U0001f4a5 \u00a0"
    yield "deep lists", _nested(90)
    yield "deep objects", json.loads('{"a":' * 90 + "1" + "}" * 90)
    yield "too deep", DEEP_LIST
    if "minimum" in schema:
        yield "minimum", schema["minimum"]
        yield "minimum - 1", schema["minimum"] - 1
        yield "maximum", schema["maximum"]
        yield "maximum + 1", schema["maximum"] + 1
    if "maxLength" in schema and "pattern" not in schema:
        yield "longest", "é" * schema["maxLength"]
        yield "longer", "é" * (schema["maxLength"] + 1)
    if "maxLength" in schema and "pattern" in schema:
        yield "a longest string of letters", "a" * schema["maxLength"]
        yield "a longer string of letters", "a" * (schema["maxLength"] + 1)
        yield "a line feed", "a\n"
    if "enum" in schema:
        yield "unknown enum", "Sometimes"
        yield "enum in lower case", schema["enum"][-1].lower()
        for member in schema["enum"]:
            yield f"enum {member}", member


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutations_in_place(schema: Schema) -> Iterator[str]:
    """Yield the names of the mutations that add something to the value at a place, such as an unknown field. ``schema``
    is the schema of the place."""
    kind = schema.get("type")
    if kind == "object" and "additionalProperties" not in schema:
        yield "unknown field"
    if kind == "array":
        yield "items twice"
        yield "too many items"
    if "additionalProperties" in schema:
        yield "too many entries"
        yield "a key that is no label"
        yield "null as value"


def change(spec: dict[str, Any], path: SchemaPath, how: str, schema: Schema, replacement: Any) -> dict[str, Any] | None:
    """Return a copy of ``spec`` with one mutation at ``path``, or None if ``spec`` has no value at ``path``. ``how`` is
    the name of the mutation. ``replacement`` is the new value, which is not used for a mutation that adds something to
    the value."""
    spec = copy.deepcopy(spec)
    holder = {"spec": spec}
    node: Any = holder
    keys: list[str | int] = []
    for part in ("spec", *path):
        key: str | int = 0 if part == "[]" else next(iter(node), "") if part == "*" else part
        keys.append(key)
        try:
            parent, node = node, node[key]
        except (KeyError, IndexError, TypeError):
            return None
    if how in set(mutations_in_place(schema)):
        _add(node, how, schema)
    elif replacement is MISSING:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = replacement
    return holder["spec"]


def _add(node: Any, how: str, schema: Schema) -> None:
    if how == "unknown field":
        node["unknownField"] = 1
    elif how == "items twice":
        node.extend(copy.deepcopy(node))
    elif how == "too many items":
        node.extend(copy.deepcopy(node or [1]) * (schema["maxItems"] + 1))
    elif how == "too many entries":
        value = next(iter(node.values()), "x")
        node.update({f"key-{number}": value for number in range(schema["maxProperties"] + 1)})
    elif how == "a key that is no label":
        node["-no label-"] = next(iter(node.values()), "x")
    else:
        node["key"] = None


def to_text(document: Any) -> str:
    """Return ``document`` as JSON text. `DEEP_LIST` becomes nested brackets."""
    text = json.dumps(document, default=lambda marker: f"<{marker!r}>")
    return text.replace(f'"<{DEEP_LIST!r}>"', "[" * DEPTH + "]" * DEPTH)


def with_deep_list(document: Any) -> Any:
    """Return ``document`` with nested lists in place of `DEEP_LIST`, for the Python validation."""
    if isinstance(document, dict):
        return {key: with_deep_list(value) for key, value in document.items()}
    if isinstance(document, list):
        return [with_deep_list(value) for value in document]
    return _nested(DEPTH) if document is DEEP_LIST else document
