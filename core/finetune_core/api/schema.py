"""Makes the structural OpenAPI 3.0 schema of a pydantic model. The CRD and the API reference are generated from this
schema, and `finetune validate` evaluates the CEL rules in it.

Pydantic's JSON schema has parts that the API server refuses, such as references, nullable unions, `const` and numeric
exclusive bounds, and parts that no reader of the CRD needs, such as titles. This module rewrites or drops these parts.
For a model that can't be expressed as a structural schema, the functions raise ValueError.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from finetune_core.api.base import ApiModel


class _KubernetesJsonSchema(GenerateJsonSchema):
    """Generates JSON schemas in which no field can be null. An optional field can be absent instead, and a default of
    None is left out."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default") is None and "default_factory" not in schema:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        """Return the default ``dft`` as JSON. The default of a section contains the defaults of all its fields, because
        the API server checks CEL rules on a default before it fills in nested defaults."""
        return dft.to_json() if isinstance(dft, ApiModel) else super().encode_default(dft)


def _structural(node: Any, definitions: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    """Return ``node``, a part of pydantic's JSON schema, as a part of a structural schema. References are replaced by
    their ``definitions``. ``path`` contains the names of the definitions in which ``node`` lies, from the outermost on.
    Parts that a structural schema must not contain are rewritten or dropped."""
    if isinstance(node, list):
        return [_structural(item, definitions, path) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[-1]
        if name in path:
            raise ValueError(f"the schema refers to itself: {' -> '.join((*path, name))}")
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        return _structural({**definitions[name], **siblings}, definitions, (*path, name))
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("title", "$defs", "discriminator", "propertyNames"):
            continue
        if key == "additionalProperties" and value is False:
            continue
        if key == "const":
            result["enum"] = [value]
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            result[key.replace("exclusiveM", "m")] = value
            result[key] = True
        elif key == "properties":
            result[key] = {name: _structural(schema, definitions, path) for name, schema in value.items()}
        elif key in ("default", "enum", "required"):
            result[key] = value
        else:
            result[key] = _structural(value, definitions, path)
    if "properties" in result:
        result.setdefault("type", "object")
    if isinstance(result.get("description"), str):
        result["description"] = " ".join(result["description"].split())
    if ("anyOf" in result or "oneOf" in result) and not result.get("x-kubernetes-int-or-string"):
        raise ValueError(f"a union can't be said in a structural schema, at {' -> '.join(path) or 'the root'}: {node}")
    return result


@cache
def openapi_schema(model: type[ApiModel]) -> dict[str, Any]:
    """Return the structural schema of ``model``. Raises ValueError where the model can't be expressed as a structural
    schema."""
    schema = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_KubernetesJsonSchema)
    result: dict[str, Any] = _structural(schema, schema.get("$defs", {}))
    return result
