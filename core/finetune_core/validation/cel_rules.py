"""Evaluates the CEL rules of the schema, the very strings that the API server evaluates, with a CEL library.

In: a defaulted object and its schema, and for an update the object before. Out: the messages of the rules that do not
hold. cel-python follows the language's definition where the faster library in Rust does not (it counts the bytes of a
string instead of its characters).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from finetune_core.validation.problems import FieldPath, Problem

Schema = Mapping[str, Any]
_ABSENT = object()


def check_rules(schema: Schema, value: Any, path: FieldPath, old: Any = _ABSENT) -> Iterator[Problem]:
    """Yield a problem for each rule at ``value`` or below that does not hold.

    Rules that speak of `oldSelf` are evaluated where ``old`` has a value too, as the server does.
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
            # Items of lists have no past here: no rule of the API needs one.
            yield from check_rules(schema["items"], child, (*path, index))


def check_rules_beside(schema: Schema, value: Any, path: FieldPath, broken: Collection[FieldPath]) -> Iterator[Problem]:
    """Yield a problem for each rule that does not hold in the sections that hold nothing ``broken``.

    For a value whose structure is wrong somewhere: what can be said of the rest is said at once.
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
    """Whether ``rule`` is true of ``value``."""
    return _is_true(rule, _variables(value, _ABSENT))


def _variables(value: Any, old: Any) -> dict[str, Any]:
    from celpy import json_to_cel

    variables = {"self": json_to_cel(value)}
    return variables if old is _ABSENT else variables | {"oldSelf": json_to_cel(old)}


def _is_true(rule: str, variables: dict[str, Any]) -> bool:
    """Whether ``rule`` is true; one that can't be evaluated does not hold, as on the server."""
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
