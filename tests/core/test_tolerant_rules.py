"""Some rules of the CRD are rewritten, so that they do not fail where a stored field still has the type of an older
version. For a field of the present type, the rewritten rules mean the same as before.

tests/api/test_older_types.py shows with the real API server that the rules hold for the older types.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_core.api.base import cel
from finetune_core.api.crd import custom_resource_definition
from finetune_core.api.older_specs import OTHER_TYPES
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.tolerant_rules import tolerate_other_types
from finetune_core.validation.cel_rules import check_rules

RULES = "x-kubernetes-validations"


def messages(schema: Any) -> list[str]:
    """Return the messages of all rules of ``schema`` and of its fields, sorted."""
    own = [rule["message"] for rule in schema.get(RULES, ())]
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return sorted(own + [message for each in inner if isinstance(each, dict) for message in messages(each)])


def section_schema(**field: Any) -> dict[str, Any]:
    """Return a schema with the section `data`, which has the optional section `task` and the required field `rows`.
    ``field`` is added to the schema of `task`."""
    task = {"type": "object", "properties": {"name": {"type": "string"}}} | field
    data = {"type": "object", "required": ["rows"], "properties": {"rows": {"type": "string"}, "task": task}}
    rules = cel(
        ("self.data == oldSelf.data", "data is fixed"),
        ("!has(self.data.task) || has(self.data.task.name)", "the task needs a name"),
        ("self.data.rows != ''", "rows are needed"),
        ("!has(self.data.task) || self.data.rows != 'x'", "x has no task"),
    )
    return {"type": "object", "required": ["data"], "properties": {"data": data}, **rules}


def violated(schema: dict[str, Any], value: Any, *old: Any) -> list[str]:
    return sorted(problem.message for problem in check_rules(schema, value, (), *old))


def test_the_crd_has_each_rule_of_the_models() -> None:
    version = custom_resource_definition()["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert messages(spec) == messages(openapi_schema(FineTuneJobSpec))


def test_a_field_with_another_type_has_no_rules_itself() -> None:
    spec = tolerate_other_types(openapi_schema(FineTuneJobSpec), OTHER_TYPES)
    for path in OTHER_TYPES:
        node = spec
        for name in path.split("."):
            node = node["properties"][name]
        assert RULES not in node


def test_the_given_schema_stays_as_it_is() -> None:
    schema = section_schema(**cel(("self.name != 'no'", "no is no name")))
    before = copy.deepcopy(schema)
    tolerate_other_types(schema, ["data.task"])
    assert schema == before


@pytest.mark.parametrize(
    ("value", "old"),
    [
        ({"data": {"rows": "a"}}, {"data": {"rows": "a"}}),
        ({"data": {"rows": "a"}}, {"data": {"rows": "b"}}),
        ({"data": {"rows": ""}}, {"data": {"rows": ""}}),
        ({"data": {"rows": "x", "task": {"name": "t"}}}, {"data": {"rows": "x", "task": {"name": "t"}}}),
        ({"data": {"rows": "a", "task": {"name": "no"}}}, {"data": {"rows": "a", "task": {"name": "no"}}}),
        ({"data": {"rows": "a", "task": {}}}, {"data": {"rows": "a", "task": {}}}),
        ({"data": {"rows": "a", "task": {"name": "t"}}}, {"data": {"rows": "a", "task": {"name": "u"}}}),
        ({"data": {"rows": "a", "task": {"name": "t"}}}, {"data": {"rows": "a"}}),
    ],
)
def test_values_of_the_schemas_types_are_judged_as_before(value: Any, old: Any) -> None:
    schema = section_schema(**cel(("self.name != 'no'", "no is no name")))
    tolerant = tolerate_other_types(schema, ["data.task"])
    assert violated(tolerant, value) == violated(schema, value)
    assert violated(tolerant, value, old) == violated(schema, value, old)


def test_only_rules_that_read_the_field_change() -> None:
    schema = section_schema()
    tolerant = tolerate_other_types(schema, ["data.task"])
    changed = [new["message"] for new, old in zip(tolerant[RULES], schema[RULES], strict=True) if new != old]
    assert changed == ["data is fixed", "the task needs a name"]


def test_a_section_that_may_be_absent_is_refused() -> None:
    schema = section_schema() | {"required": []}
    with pytest.raises(ValueError, match=r"the section `data` of `data\.task` may be absent"):
        tolerate_other_types(schema, ["data.task"])


def test_a_rule_of_the_field_about_its_old_value_is_refused() -> None:
    schema = section_schema(**cel(("self == oldSelf", "the task is fixed")))
    with pytest.raises(ValueError, match="is about an old value"):
        tolerate_other_types(schema, ["data.task"])
