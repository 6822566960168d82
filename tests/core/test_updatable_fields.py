"""Every field of the spec either has a rule that forbids updates, or is one of the fields that may change.

The test in this file looks at every field and needs no cluster. tests/api/test_updates.py sends updates of randomly
chosen fields to a real API server, so it may find a new field without a rule only later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_core.api import spec as rules
from finetune_core.api.crd import custom_resource_definition

MUTABLE = (("runPolicy",), ("storage", "checkpoint", "keepLast"), ("storage", "checkpoint", "keepBest"))
"""Fields and sections that may change after a job was created."""


def spec_schema() -> Mapping[str, Any]:
    """Return the OpenAPI schema of `spec` in the generated CRD."""
    version = custom_resource_definition()["spec"]["versions"][0]
    schema: Mapping[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def fields_without_a_rule(
    schema: Mapping[str, Any], ruled: set[tuple[str, ...]], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the fields in ``schema`` that are covered neither by ``ruled`` nor by `MUTABLE`. ``path`` is
    the path of ``schema`` itself, which may be a single field. ``ruled`` holds the paths of the fields and sections for
    which a rule forbids updates."""
    if path in ruled or path in MUTABLE:
        return
    if "properties" not in schema:
        yield path
        return
    for name, part in schema["properties"].items():
        yield from fields_without_a_rule(part, ruled, (*path, name))


def test_every_field_is_immutable_by_a_rule_or_may_change() -> None:
    ruled = {tuple(message.split("`")[1].split(".")) for _, message in rules._UNCHANGEABLE}
    missing = list(fields_without_a_rule(spec_schema(), ruled))
    assert missing == [], "add _immutable(...) in finetune_core/api/spec.py, or name the field in MUTABLE"
    addressing = ("storage", "addressing")
    assert list(fields_without_a_rule(spec_schema(), ruled - {addressing})) == [addressing]
