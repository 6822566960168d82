"""The base class of every model in the resource, and the scalar types that its fields are made of.

Kubernetes' API conventions ask for camelCase, no floats and bounds on everything: the types here carry them, so
that a section reads as a list of fields. Patterns spell their characters out: what `\\s` and `\\w` mean differs
between the API server's regular expressions and pydantic's.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel, to_snake


class ApiModel(BaseModel):
    """A section of the resource: camelCase outside, snake_case inside, immutable, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Drop nulls, as the API server does before it fills in defaults; an unknown field stays unknown."""
        if isinstance(data, dict):
            known = cls.__pydantic_fields__.keys()
            return {key: value for key, value in data.items() if value is not None or to_snake(str(key)) not in known}
        return data

    def to_json(self) -> dict[str, Any]:
        """Return the section as the API server stores it: camelCase keys, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """Return the schema extension that holds CEL ``rules``, each an expression with its message."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


def join(*extensions: dict[str, Any]) -> dict[str, Any]:
    """Return one schema extension that holds the rules of all ``extensions``."""
    rules = [rule for extension in extensions for rule in extension["x-kubernetes-validations"]]
    return {"x-kubernetes-validations": rules}


def exactly_one_of(*fields: str) -> dict[str, Any]:
    """Return the CEL rule of a union without discriminator: one member is set, as in a Kubernetes volume."""
    return cel((f"{_set_members(fields)} == 1", f"exactly one of {_names(fields)} must be set"))


def at_most_one_of(*fields: str) -> dict[str, Any]:
    """Return the CEL rule of a union that may also be left out."""
    return cel((f"{_set_members(fields)} <= 1", f"at most one of {_names(fields)} must be set"))


def _set_members(fields: tuple[str, ...]) -> str:
    members = ", ".join(f"has(self.{field})" for field in fields)
    return f"[{members}].filter(set, set).size()"


def _names(fields: tuple[str, ...]) -> str:
    return ", ".join(f"`{field}`" for field in fields)


SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}
"""Schema extension of a list whose items are unique."""
ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
"""Schema extension of a list that is always replaced as a whole."""


def by_key(*keys: str) -> dict[str, Any]:
    """Return the schema extension of a list of named objects; server-side apply merges them by ``keys``."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


def _unique(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError("must hold each value once")
    return values


def _unique_names(values: list[Any]) -> list[Any]:
    if len({value.name for value in values}) != len(values):
        raise ValueError("must hold each `name` once")
    return values


def _without_null(values: Any) -> Any:
    return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


ENTRIES = BeforeValidator(_without_null)
"""A map in which null means that there is no such entry, as on the server."""
UNIQUE = AfterValidator(_unique)
"""What `SET` asks of the server."""
UNIQUE_NAMES = AfterValidator(_unique_names)
"""What `by_key("name")` asks of the server."""

DecimalString = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$")]
"""A non-negative decimal as a string ("1e-4", "0.05"): the API conventions forbid floats."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""The name of a Secret, PersistentVolumeClaim or ServiceAccount in the job's namespace."""

SecretKey = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]

S3Uri = Annotated[str, Field(max_length=1024, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^ \t\r\n\f]*)?$")]
"""`s3://bucket/key`: a place in the object store that `storage.endpoint` names."""

HttpUrl = Annotated[str, Field(max_length=512, pattern=r"^https?://[^/ \t\r\n\f]+(/[^ \t\r\n\f]*)?$")]


def int_or_string(pattern: str, *, least: int, most: int) -> dict[str, Any]:
    """Return the schema of an integer from ``least`` to ``most``, or a string of ``pattern``."""
    return {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "minimum": least,
        "maximum": most,
        "maxLength": QUANTITY_LENGTH,
        "pattern": pattern,
    }


QUANTITY_LENGTH = 16

LabelKey = str
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
LABEL_LENGTH = 63
"""SHORT"""

LabelValue = Annotated[str, Field(max_length=LABEL_LENGTH, pattern=LABEL_VALUE_PATTERN)]
DnsLabel = Annotated[str, Field(min_length=1, max_length=LABEL_LENGTH, pattern=DNS_LABEL_PATTERN)]
QualifiedName = Annotated[str, Field(min_length=1, max_length=317)]
