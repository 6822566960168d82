"""Evaluates the CEL rules in the schema (`x-kubernetes-validations`), as the API server does.

The input is an object whose defaults are filled in, and the object's schema. For an update the old object is an input
too. The result lists the violated rules, each with the path of its field and its message. The CEL library is
cel-python. A faster library, written in Rust, is not used, because its `size()` counts the bytes of a string, whereas
CEL defines `size()` as the number of characters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from finetune_core.validation.problems import FieldPath, Problem

Schema = Mapping[str, Any]
_ABSENT = object()
"""Placeholder for an old value that does not exist. None can't be the placeholder, because None may itself be an old
value."""


def check_rules(schema: Schema, value: Any, path: FieldPath, old: Any = _ABSENT) -> Iterator[Problem]:
    """Yield a problem for each violated rule about ``value`` and about the values inside it.

    ``old`` is the value before an update. A rule that contains `oldSelf` is evaluated only where ``old`` has a value at
    the same path, as in the API server.
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
            # The items of a list are checked without old values, because no rule in the API about an item of a list, or
            # about a field inside it, contains `oldSelf`.
            yield from check_rules(schema["items"], child, (*path, index))


def check_rules_beside(schema: Schema, value: Any, path: FieldPath, broken: Collection[FieldPath]) -> Iterator[Problem]:
    """Yield a problem for each violated rule, but only for sections without structural problems. ``broken`` contains
    the paths of the fields with structural problems, such as a wrong type.

    With this function, one run of `finetune validate` reports the structural problems and also the violated rules of
    all other sections.
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
    """Return whether the CEL expression ``rule`` is true for ``value``."""
    return _is_true(rule, _variables(value, _ABSENT))


def _variables(value: Any, old: Any) -> dict[str, Any]:
    from celpy import json_to_cel

    variables = {"self": json_to_cel(value)}
    return variables if old is _ABSENT else variables | {"oldSelf": json_to_cel(old)}


def _is_true(rule: str, variables: dict[str, Any]) -> bool:
    """Return whether the CEL expression ``rule`` is true. A rule that fails to evaluate counts as violated, as in the
    API server."""
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
