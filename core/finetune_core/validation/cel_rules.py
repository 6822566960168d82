"""Evaluates the CEL rules in the schema (`x-kubernetes-validations`), which are also the rules that the API server
evaluates.

The input is an object with defaults and its schema, and for an update the old object. The result lists the messages of
the violated rules. cel-python is used instead of the faster Rust library, because the Rust library deviates from the
language's definition: it measures strings in bytes instead of characters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from finetune_core.validation.problems import FieldPath, Problem

Schema = Mapping[str, Any]
_ABSENT = object()
"""Marks that there is no old value, because None may be an old value."""


def check_rules(schema: Schema, value: Any, path: FieldPath, old: Any = _ABSENT) -> Iterator[Problem]:
    """Yield a problem for each violated rule at ``value`` and below.

    Like the API server, rules with `oldSelf` are evaluated only where ``old`` has a value too.
    """
    rules = schema.get("x-kubernetes-validations")
    if rules:
        variables = _variables(value, old)
        for rule in rules:
            if "oldSelf" in rule["rule"] and old is _ABSENT:
                continue
            if not _is_true(rule["rule"], variables):
                yield Problem(path, rule["message"])
    if isinstance(value, dict):
        for name, child in value.items():
            below = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(below, dict):
                before = old[name] if isinstance(old, dict) and name in old else _ABSENT
                yield from check_rules(below, child, (*path, name), before)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            # No transition rule of the API is below a list, so items are checked without an old value.
            yield from check_rules(schema["items"], child, (*path, index))


def check_rules_beside(schema: Schema, value: Any, path: FieldPath, broken: Collection[FieldPath]) -> Iterator[Problem]:
    """Yield a problem for each violated rule in the sections that contain none of the ``broken`` paths.

    With this, one run of `finetune validate` reports the violated rules together with the structural problems.
    """
    if not any(place[: len(path)] == path for place in broken):
        yield from check_rules(schema, value, path)
    elif isinstance(value, dict):
        for name, child in value.items():
            if name in schema.get("properties", {}):
                yield from check_rules_beside(schema["properties"][name], child, (*path, name), broken)
    elif isinstance(value, list) and "items" in schema:
        for index, child in enumerate(value):
            yield from check_rules_beside(schema["items"], child, (*path, index), broken)


def holds(rule: str, value: Any) -> bool:
    """Return whether ``rule`` is true for ``value``."""
    return _is_true(rule, _variables(value, _ABSENT))


def _variables(value: Any, old: Any) -> dict[str, Any]:
    from celpy import json_to_cel

    variables = {"self": json_to_cel(value)}
    return variables if old is _ABSENT else variables | {"oldSelf": json_to_cel(old)}


def _is_true(rule: str, variables: dict[str, Any]) -> bool:
    """Return whether ``rule`` is true. A rule that fails to evaluate counts as violated, as in the API server."""
    from celpy import CELEvalError

    try:
        return bool(_program(rule).evaluate(variables))
    except CELEvalError:
        return False


@cache
def _program(rule: str) -> Any:
    from celpy import Environment

    environment = Environment()
    return environment.program(environment.compile(rule))
