"""Turns the pydantic models into the CustomResourceDefinition (a structural OpenAPI 3.0 schema).

`python -m finetune_core.api.crd FOLDER` writes it; a test holds the committed file equal to the models. What
pydantic writes and the API server refuses (references, titles, nullable unions, `const`, numeric exclusive
bounds) is rewritten here; what can't be said in a structural schema raises.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from finetune_core.api.base import cel
from finetune_core.api.job import (
    GROUP,
    KIND,
    NAME_MAX_LENGTH,
    NAME_PATTERN,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
    VERSION,
    FineTuneJob,
    printer_columns,
)
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import FineTuneJobStatus

CRD_FILE = f"{GROUP}_{PLURAL}.yaml"


class _KubernetesJsonSchema(GenerateJsonSchema):
    """Optional fields are absent, never null; a default of None is no default."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default") is None and "default_factory" not in schema:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def _structural(node: Any, definitions: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    """Return ``node`` with references inlined and everything rewritten that a structural schema forbids."""
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
        elif key == "default":
            # Whole, though nested defaults would fill an empty object: the server evaluates an object's CEL rules
            # on its default as it stands, and refuses the CRD where a rule reads a field that is missing there.
            result[key] = _without_null(value)
        else:
            result[key] = _structural(value, definitions, path)
    if "properties" in result:
        result.setdefault("type", "object")
    if isinstance(result.get("description"), str):
        result["description"] = " ".join(result["description"].split())
    if ("anyOf" in result or "oneOf" in result) and not result.get("x-kubernetes-int-or-string"):
        raise ValueError(f"a union can't be said in a structural schema, at {' -> '.join(path) or 'the root'}: {node}")
    return result


def _without_null(value: Any) -> Any:
    """Return a default without absent fields: the schema has no null."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value


def openapi_schema(model: type[FineTuneJobSpec | FineTuneJobStatus]) -> dict[str, Any]:
    """Return the structural schema of ``model``; raises ValueError where it can't be structural."""
    schema = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_KubernetesJsonSchema)
    result: dict[str, Any] = _structural(schema, schema.get("$defs", {}))
    return result


def custom_resource_definition() -> dict[str, Any]:
    """Return the manifest of the CustomResourceDefinition."""
    root = {
        "type": "object",
        "description": " ".join((FineTuneJob.__doc__ or "").split()),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": openapi_schema(FineTuneJobSpec),
            "status": openapi_schema(FineTuneJobStatus),
        },
        **cel(
            (
                f"self.metadata.name.matches('{NAME_PATTERN}') && self.metadata.name.size() <= {NAME_MAX_LENGTH}",
                "`metadata.name` must start with a letter, hold only a-z, 0-9 and '-', and have at most"
                f" {NAME_MAX_LENGTH} characters",
            )
        ),
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": printer_columns(),
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def crd_yaml() -> str:
    """Return the manifest as the text that is committed."""
    header = "# Generated from core/finetune_core/api by `make crds`; do not edit.\n"
    return header + yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=100)


def chart_template() -> str:
    """Return the manifest as a template of the Helm chart: behind `crds.enabled`, kept with `crds.keep`.

    CRDs in a chart's own `crds/` folder are never upgraded, so they are a template.
    """
    text = crd_yaml()
    if "{{" in text:
        raise ValueError("the manifest holds {{, which Helm would take for its own")
    header, _, manifest = text.partition("\n")
    keep = "metadata:\n{{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n{{- end }}\n"
    body = manifest.replace("metadata:\n", keep, 1)
    return f"{header}\n{{{{- if .Values.crds.enabled }}}}\n{body}{{{{- end }}}}\n"


def main() -> None:
    """Write the manifest into a folder."""
    parser = argparse.ArgumentParser(
        description="Write the CustomResourceDefinition of FineTuneJob.",
        epilog="example: python -m finetune_core.api.crd crds",
    )
    parser.add_argument("folder", type=Path, help="folder for the manifest")
    parser.add_argument("--chart", action="store_true", help="write it as a template of the Helm chart")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    (folder / CRD_FILE).write_text(chart_template() if arguments.chart else crd_yaml(), encoding="utf-8")


if __name__ == "__main__":
    main()
