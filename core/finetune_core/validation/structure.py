"""Checks a spec against the pydantic models as strictly as the API server checks it against the CRD's schema.

The input is the spec as parsed from YAML or JSON. The result is the spec as a pydantic model with all defaults, or a
list of problems, at most one for each field. A problem has the path of the field, and a sentence that is mostly made
from the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.pattern_meanings import FOREIGN_VALUES, PATTERN_MEANINGS
from finetune_core.validation.problems import FieldPath, Problem, unknown_field

DEPTH_LIMIT = 100
"""Largest number of nested levels that a spec may have. The spec itself is the first level, and a value that is neither
a list nor an object counts as a level too. A job needs about a dozen levels, and JSON parsers fail at some depth beyond
100."""

Schema = dict[str, Any]


def is_json(spec: Any) -> bool:
    """Return whether ``spec`` can be written as JSON: not nested too deep, and without values that JSON can't
    express."""
    return next(_unreadable(spec), None) is None


def check_structure(spec: Any) -> tuple[FineTuneJobSpec | None, list[Problem]]:
    """Return the parsed spec and an empty list where ``spec`` fits the models, else None and the problems of
    ``spec``."""
    obstacle = next(_unreadable(spec), None)
    if obstacle is not None:
        return None, [obstacle]
    try:
        # The spec is validated as JSON text, because pydantic's strict mode for JSON accepts the same types as the API
        # server. `by_name=False` makes Python names such as `max_steps` unknown fields.
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
    """Yield a problem for each key or value in ``root`` that JSON can't express, and for each value that is nested too
    deep. The function uses a list as a stack and no recursion, because deep nesting would overflow Python's call
    stack."""
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
    """Return pydantic's ``error`` as a problem with the path of the field and a sentence for people."""
    path, node = _locate(schema, error["loc"])
    kind, value = error["type"], error.get("input")
    if kind == "missing":
        return Problem(path, "must be set")
    if kind == "extra_forbidden":
        return Problem(path, unknown_field(str(path[-1]), node.get("properties", {})))
    if kind == "value_error":
        return Problem(path, str(error["ctx"]["error"]))
    return Problem(path, expectation(node, value))


def _locate(schema: Schema, location: tuple[str | int, ...]) -> tuple[FieldPath, Schema]:
    """Return the path of the field that an error is about, and the schema at that path. For an unknown field, return
    the schema of the section that contains the field.

    Where pydantic reports an error about a union, the last part of ``location`` names a member of the union. This part
    is not a field, so the path leaves it out.
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


def expectation(node: Schema, value: Any = None) -> str:
    """Return what a value must be according to its schema ``node``, for example `must be between 1 and 512`. ``value``
    is the value that was refused. The text may depend on it: a number in place of a text must be put in quotes."""
    kind = node.get("type")
    if node.get("x-kubernetes-int-or-string"):
        text = PATTERN_MEANINGS[node["pattern"]]
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
        hint = FOREIGN_VALUES.get((tuple(node["enum"]), str(value)))
        return f"must be one of {', '.join(node['enum'])}" + (f": {hint}" if hint else "")
    hint = "; put it in quotes" if isinstance(value, int | float) else ""
    return _text_expectation(node) + hint


def _text_expectation(node: Schema) -> str:
    least, most = node.get("minLength", 0), node.get("maxLength")
    length = f"{least} to {most} characters" if least else f"at most {most} characters"
    if "pattern" in node:
        return f"must be {PATTERN_MEANINGS[node['pattern']]}, of {length}"
    return f"must be a string of {length}"
