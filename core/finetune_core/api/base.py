"""The base class of every model in the resource, and the scalar types that its fields are made of.

Kubernetes' API conventions ask for camelCase, no floats and bounds on everything: the types here carry them, so
that a section reads as a list of fields.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """A section of the resource: camelCase outside, snake_case inside, immutable, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """Return the section as the API server stores it: camelCase keys, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """Return the schema extension that holds CEL ``rules``, each an expression with its message."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


def exactly_one_of(*fields: str) -> dict[str, Any]:
    """Return the CEL rule of a union without discriminator: one member is set, as in a Kubernetes volume."""
    members = ", ".join(f"has(self.{field})" for field in fields)
    names = ", ".join(f"`{field}`" for field in fields)
    return cel((f"[{members}].filter(set, set).size() == 1", f"exactly one of {names} must be set"))


DecimalString = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$")]
"""A non-negative decimal as a string ("1e-4", "0.05"): the API conventions forbid floats."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""The name of a Secret, PersistentVolumeClaim or ServiceAccount in the job's namespace."""

SecretKey = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]

S3Uri = Annotated[str, Field(max_length=1024, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s]*)?$")]
"""`s3://bucket/key`: a place in the object store that `storage.endpoint` names."""

Quantity = Annotated[
    int | str,
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 32,
            "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        }
    ),
]
"""A Kubernetes quantity: `4`, `500m`, `64Gi`."""

LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
ShortText = Annotated[str, Field(max_length=1024)]
