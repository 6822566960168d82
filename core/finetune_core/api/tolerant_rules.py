"""Makes the CEL rules of the CRD hold for stored jobs in which a field has the type of an older version.

The API server evaluates all rules in each write, also in a write of the status. A rule that reads a value of another
type than the schema's fails, and the API server then refuses the write. It does so even where the value has not
changed: the ratcheting of the API server forgives an unchanged value for a rule that is false, but not for a rule that
fails. So without this module nobody could change such a job, and the operator could not write its status.

CEL can't ask for the type of such a value. But each comparison of such a value fails, and `in` counts a comparison that
fails as false. So `self in [self]` is false exactly where a field in `self` has another type than in the schema, and
this module puts that question before each rule that reads such a field.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

_RULES = "x-kubernetes-validations"


def tolerate_other_types(schema: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return a copy of the structural ``schema`` in which each rule that reads the field at one of ``paths`` holds
    where that field has another type than in the schema. Otherwise the rules mean what they meant.

    A rule that makes the section of the field immutable still holds only if the other fields of the section stay as
    they are. Raises ValueError where that section may be absent, and where the field has a rule about its old value,
    because this module can't rewrite the rules then.
    """
    result: dict[str, Any] = copy.deepcopy(dict(schema))
    for path in paths:
        *parents, name = path.split(".")
        sections = [result]
        for parent in parents:
            if parent not in sections[-1].get("required", ()) and "default" not in sections[-1]["properties"][parent]:
                raise ValueError(f"the section `{parent}` of `{path}` may be absent")
            sections.append(sections[-1]["properties"][parent])
        for depth, section in enumerate(sections):
            for rule in section.get(_RULES, ()):
                rule["rule"] = _tolerant(rule["rule"], parents[depth:], name, sections[-1])
        _lift(sections[-1], name)
    return result


def _lift(section: dict[str, Any], name: str) -> None:
    """Move the rules of the field ``name`` to the ``section`` that has the field. A rule of the field itself fails with
    each use of `self`, so it can't ask any question first. The API server names the field in its messages as before."""
    for rule in section["properties"][name].pop(_RULES, ()):
        if "oldSelf" in rule["rule"]:
            raise ValueError(f"the rule `{rule['rule']}` of `{name}` is about an old value")
        inner = re.sub(r"\bself\b", f"self.{name}", rule["rule"])
        text = f"!has(self.{name}) || !(self in [self]) || ({inner})"
        section.setdefault(_RULES, []).append({"message": rule["message"], "rule": text, "fieldPath": f".{name}"})


def _tolerant(rule: str, parents: list[str], name: str, owner: Mapping[str, Any]) -> str:
    """Return ``rule`` with the question of this module, where the rule reads the field ``name``.

    ``parents`` leads from the place of the rule to ``owner``, the section that has the field.
    """
    section = ".".join(["self", *parents])
    if not _reads(rule, parents, name):
        return rule
    if rule == f"{section} == oldSelf.{'.'.join(parents)}":
        old = section.replace("self", "oldSelf", 1)
        rest = " && ".join(_unchanged(field, section, old, owner) for field in owner["properties"] if field != name)
        return f"{old} in [{old}] ? {rule} : {rest}"
    return f"!({section} in [{section}]) || ({rule})"


def _reads(rule: str, parents: list[str], name: str) -> bool:
    """Return whether ``rule`` reads the value of the field ``name`` below ``parents``, alone or with a whole section.
    The question whether the field is set reads no value."""
    path = [*parents, name]
    text = rule.replace(f"has(self.{'.'.join(path)})", "")
    wholes = (".".join(path[:length]) for length in range(1, len(path)))
    as_a_part = any(re.search(rf"\b(self|oldSelf)\.{re.escape(whole)}(?![.\w])", text) for whole in wholes)
    return as_a_part or re.search(rf"\bself\.{re.escape('.'.join(path))}\b", text) is not None


def _unchanged(field: str, new: str, old: str, owner: Mapping[str, Any]) -> str:
    same = f"{new}.{field} == {old}.{field}"
    if field in owner.get("required", ()) or "default" in owner["properties"][field]:
        return same
    return f"has({new}.{field}) == has({old}.{field}) && (!has({new}.{field}) || {same})"
