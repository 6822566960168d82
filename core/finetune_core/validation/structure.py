"""Checks a spec against the pydantic models as strictly as the API server checks it against the schema.

In: the spec as it was parsed from YAML or JSON. Out: the model with all defaults, or every problem with its path and
a sentence made from the schema.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.problems import FieldPath, Problem

DEPTH_LIMIT = 100
"""No job is nested deeper than a dozen levels; parsers of all languages give up somewhere beyond this."""

Schema = dict[str, Any]


def is_json(spec: Any) -> bool:
    """Whether ``spec`` can be looked at further: neither too deep nor holding what JSON has no word for."""
    return next(_unreadable(spec), None) is None


def check_structure(spec: Any) -> tuple[FineTuneJobSpec | None, list[Problem]]:
    """Return the model of ``spec``, or the problems that keep it from being one."""
    obstacle = next(_unreadable(spec), None)
    if obstacle is not None:
        return None, [obstacle]
    try:
        # As JSON: what pydantic calls strict is then what the server does; names of Python attributes are no fields.
        text = json.dumps(spec)
        return FineTuneJobSpec.model_validate_json(text, strict=True, by_alias=True, by_name=False), []
    except ValidationError as error:
        schema = openapi_schema(FineTuneJobSpec)
        found: dict[FieldPath, Problem] = {}
        for item in error.errors(include_url=False, include_context=True):
            problem = _problem(schema, item)
            found.setdefault(problem.path, problem)
        return None, list(found.values())


def _unreadable(root: Any) -> Iterator[Problem]:
    """Yield what can't even be turned into JSON. With a stack of its own: depth is what it looks for."""
    stack: list[tuple[Any, FieldPath]] = [(root, ("spec",))]
    while stack:
        node, path = stack.pop()
        if len(path) > DEPTH_LIMIT:
            yield Problem(path[:6], f"must not be nested deeper than {DEPTH_LIMIT} levels")
        elif isinstance(node, dict):
            for key, value in node.items():
                if not isinstance(key, str) or not _is_text(key):
                    yield Problem(path, "must have keys that are strings")
                else:
                    stack.append((value, (*path, key)))
        elif isinstance(node, list):
            stack += [(value, (*path, index)) for index, value in enumerate(node)]
        elif isinstance(node, str) and not _is_text(node):
            yield Problem(path, "must be text without half surrogate pairs")
        elif isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
            yield Problem(path, "must be a finite number")


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value) if not value.isascii() else True


def _problem(schema: Schema, error: Any) -> Problem:
    """Translate a pydantic error: its place to a path of the schema, its kind to a sentence."""
    path, node = _locate(schema, error["loc"])
    kind, value = error["type"], error.get("input")
    if kind == "missing":
        return Problem(path, "must be set")
    if kind == "extra_forbidden":
        return Problem(path, _unknown_field(str(path[-1]), node))
    if kind == "value_error":
        return Problem(path, str(error["ctx"]["error"]))
    return Problem(path, expectation(node, value))


def _locate(schema: Schema, location: tuple[str | int, ...]) -> tuple[FieldPath, Schema]:
    """Return the path of an error, and the schema there (of an unknown field: that of its parent).

    Pydantic appends the member of a union to the place; that part is no field and is left out.
    """
    path: FieldPath = ("spec",)
    node = schema
    for part in location:
        if isinstance(part, int) and "items" in node:
            node = node["items"]
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        elif isinstance(node.get("additionalProperties"), dict) and part != "[key]":
            node = node["additionalProperties"]
        elif "properties" in node or node.get("type") == "object":
            return (*path, part), node
        else:
            break
        path = (*path, part)
    return path, node


def _unknown_field(name: str, parent: Schema) -> str:
    close = difflib.get_close_matches(name, parent.get("properties", {}), n=1)
    return f"unknown field; did you mean `{close[0]}`?" if close else "unknown field"


def expectation(node: Schema, value: Any = None) -> str:
    """Return what a value must be by its schema: `must be between 1 and 512`."""
    kind = node.get("type")
    if node.get("x-kubernetes-int-or-string"):
        word = node["pattern"].strip("^$")
        text = word if word.isalpha() else f"a string that matches {node['pattern']}"
        return f"must be a whole number between {node['minimum']} and {node['maximum']}, or {text}"
    if kind == "integer":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return f"must be {'' if whole else 'a whole number '}between {node['minimum']} and {node['maximum']}"
    if kind == "boolean":
        return "must be true or false"
    if kind == "object":
        most = f" with at most {node['maxProperties']} entries" if "maxProperties" in node else ""
        return f"must be an object{most}"
    if kind == "array":
        least = f" at least {node['minItems']} and" if "minItems" in node else ""
        return f"must be a list of{least} at most {node['maxItems']} items"
    if "enum" in node:
        return f"must be one of {', '.join(node['enum'])}"
    hint = "; put it in quotes" if isinstance(value, int | float) else ""
    return _text_expectation(node) + hint


def _text_expectation(node: Schema) -> str:
    least, most = node.get("minLength", 0), node.get("maxLength")
    length = f"{least} to {most} characters" if least else f"at most {most} characters"
    pattern = f" that matches {node['pattern']}" if "pattern" in node else ""
    return f"must be a string of {length}{pattern}"
