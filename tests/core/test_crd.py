"""The CRD file in the repository equals the CRD that is generated from the pydantic models. The schema has no
keyword that the API server forbids in a CRD, and it keeps rules of this project: each field has a description, no
number is a float, and strings, lists and maps have a largest size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.crd import CRD_FILE, crd_yaml, custom_resource_definition
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec

ROOT = Path(__file__).resolve().parents[2]


def _schemas(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the schema of ``node`` itself and of every place below it: fields, list items and map values.
    ``path`` is the path of ``node``."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _schemas(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from _schemas(node[key], f"{path}[]")


def _all_schemas() -> list[tuple[str, dict[str, Any]]]:
    root = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return [item for part in ("spec", "status") for item in _schemas(root["properties"][part], part)]


def test_committed_manifest_is_the_generated_one() -> None:
    committed = (ROOT / "crds" / CRD_FILE).read_text(encoding="utf-8")
    assert committed == crd_yaml(), "run: make crds"


def test_every_field_is_described() -> None:
    missing = [path for path, schema in _all_schemas() if "description" not in schema and not path.endswith("[]")]
    assert missing == []


def test_every_string_list_and_map_is_bounded() -> None:
    unbounded = []
    for path, schema in _all_schemas():
        kind = schema.get("type")
        bounded_string = "maxLength" in schema or "enum" in schema or schema.get("format") == "date-time"
        if (kind == "string" and not bounded_string) or (kind == "array" and "maxItems" not in schema):
            unbounded.append(path)
        if isinstance(schema.get("additionalProperties"), dict) and "maxProperties" not in schema:
            unbounded.append(path)
    assert unbounded == []


def test_no_floats_and_no_escape_from_the_schema() -> None:
    for path, schema in _all_schemas():
        assert schema.get("type") != "number", path
        assert "x-kubernetes-preserve-unknown-fields" not in schema, path
        assert not {"title", "$ref", "$defs", "oneOf", "allOf", "const"} & schema.keys(), path
        if "anyOf" in schema:
            assert schema["x-kubernetes-int-or-string"] is True, path


def test_defaults_of_sections_are_complete() -> None:
    spec = openapi_schema(FineTuneJobSpec)
    # A section's default contains the defaults of its fields too, because the API server checks CEL rules on a
    # section's default before it fills in the defaults of fields.
    assert spec["properties"]["runPolicy"]["default"] == {"suspend": False, "cancel": False, "maxRetries": 3}
    assert spec["properties"]["runPolicy"]["properties"]["maxRetries"]["default"] == 3
    assert "default" not in spec["properties"]["training"]["properties"]["learningRate"]


def test_items_of_lists_have_no_defaults() -> None:
    """An item of a list must have no default, because kubectl apply and Argo CD compare whole lists. A default that the
    API server adds to an item would look like drift."""
    spec = [(path, schema) for path, schema in _all_schemas() if path.startswith("spec")]
    assert [path for path, schema in spec if "[]" in path and "default" in schema] == []


@pytest.mark.parametrize("section", ["model", "dataset", "training", "storage.uri", "storage.runId", "podTemplate"])
def test_identity_of_a_job_is_immutable(section: str) -> None:
    rules = openapi_schema(FineTuneJobSpec)["x-kubernetes-validations"]
    message = f"`{section}` must not change after creation; create a new FineTuneJob"
    assert any(rule["message"] == message for rule in rules)


def test_examples_parse() -> None:
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert FineTuneJobSpec.model_validate(job["spec"]).storage.uri.startswith("s3://"), path
