"""The base class of the pydantic models that make up the FineTuneJob resource (all but `Metadata`), and the scalar
types that many fields share.

Kubernetes' API conventions ask for camelCase names, no floats, and bounds on every string and list. The types here
contain the bounds, so that each section of the API reads as a list of fields. Regular expressions name their characters
explicitly (`[0-9]`, not `\\d`), because `\\d`, `\\s` and `\\w` match only ASCII in the API server and all of Unicode in
pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel, to_snake


class ApiModel(BaseModel):
    """The base class of the sections of a FineTuneJob. Keys are camelCase in YAML and snake_case in Python. Unknown
    fields are refused, unless a subclass ignores them, as `StatusModel` does."""

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
        """Return ``data`` without the keys whose value is null, because the API server drops such keys before it fills
        in defaults.

        An unknown key is kept even where its value is null, so that the unknown field is still refused.
        """
        if isinstance(data, dict):
            known = cls.__pydantic_fields__.keys()
            return {key: value for key, value in data.items() if value is not None or to_snake(str(key)) not in known}
        return data

    def to_json(self) -> dict[str, Any]:
        """Return the section as the API server stores it, with camelCase keys and without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """Return a schema extension with the CEL ``rules``. Each rule consists of a CEL expression and the message that
    users see where the expression is false."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


def join(*extensions: dict[str, Any]) -> dict[str, Any]:
    """Return one schema extension with the CEL rules of all ``extensions``. Each extension is a result of `cel`, or of
    a function that calls `cel`."""
    rules = [rule for extension in extensions for rule in extension["x-kubernetes-validations"]]
    return {"x-kubernetes-validations": rules}


def exactly_one_of(*fields: str) -> dict[str, Any]:
    """Return a schema extension with the CEL rule that exactly one of ``fields`` must be set. Kubernetes' volumes, for
    example, have the same rule about their sources."""
    return cel((f"{_set_members(fields)} == 1", f"exactly one of {_names(fields)} must be set"))


def at_most_one_of(*fields: str) -> dict[str, Any]:
    """Return a schema extension with the CEL rule that at most one of ``fields`` may be set."""
    return cel((f"{_set_members(fields)} <= 1", f"at most one of {_names(fields)} must be set"))


def _set_members(fields: tuple[str, ...]) -> str:
    members = ", ".join(f"has(self.{field})" for field in fields)
    return f"[{members}].filter(set, set).size()"


def _names(fields: tuple[str, ...]) -> str:
    return ", ".join(f"`{field}`" for field in fields)


SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}
"""Schema extension for a list in which no value may occur twice."""
ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
"""Schema extension for a list that server-side apply replaces as a whole."""


def by_key(*keys: str) -> dict[str, Any]:
    """Return the schema extension for a list of objects in which server-side apply identifies each object by its fields
    ``keys``, for example by `name`. No two objects may have equal values in these fields."""
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
"""Validator for a map. Entries with a null value are dropped, as the API server drops them."""
UNIQUE = AfterValidator(_unique)
"""Validator for a list of scalars. A list in which a value occurs twice is refused. The API server refuses such a list
because of the schema extension `SET`."""
UNIQUE_NAMES = AfterValidator(_unique_names)
"""Validator for a list of objects. A list in which a `name` occurs twice is refused. The API server refuses such a list
because of the schema extension `by_key("name")`."""

DecimalString = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$")]
"""A decimal number from 0 on, as a string because Kubernetes' API conventions forbid floats, for example `"1e-4"` or
`"0.05"`."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""`metadata.name` of a Secret, ConfigMap, PersistentVolumeClaim, StorageClass, PriorityClass or ServiceAccount."""

JOB_NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""Regular expression for `metadata.name` of a FineTuneJob."""
JOB_NAME_LENGTH = 40
"""Largest number of characters of `metadata.name` of a FineTuneJob."""
JobName = Annotated[str, Field(min_length=1, max_length=JOB_NAME_LENGTH, pattern=JOB_NAME_PATTERN)]
"""`metadata.name` of a FineTuneJob."""

SecretKey = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
"""A key in the `data` of a Secret or a ConfigMap, for example `ca.crt`."""

_CONTROL = r"\x00-\x20\x7f-\xa0"
"""Ranges of characters that addresses and names must not contain, for use between `[` and `]` in a regular expression.
The ranges contain the control characters (C0, DEL and C1), the space and the no-break space. Control characters are
refused because a terminal that shows the text would obey them."""
WORD_PATTERN = f"^[^{_CONTROL}]+$"
"""Regular expression for a text without blanks and control characters, for example the name of a container image."""
HTTP_ADDRESS_PATTERN = f"^https?://[^/@?#{_CONTROL}]+/?$"
"""Regular expression for an `http://` or `https://` address without user, path and query, for example
`http://minio:9000`. A slash after host and port is allowed, because many people write addresses with a slash at the
end."""
S3_URI_PATTERN = f"^s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/[^{_CONTROL}]*)?$"
"""Regular expression for an address in an object store, for example `s3://bucket/key`."""
WEIGHT_PATTERN = r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)$"
"""Regular expression for a decimal number above 0, for example `0.5`."""
HTTP_URL_PATTERN = f"^https?://[^/{_CONTROL}]+(/[^{_CONTROL}]*)?$"
"""Regular expression for an `http://` or `https://` address with an optional path."""

S3Uri = Annotated[
    str,
    Field(
        max_length=1024,
        pattern=S3_URI_PATTERN,
        json_schema_extra=cel(
            (
                "!self.matches('/[.][.]?(/|$)')",
                "the address must not have `.` or `..` as a part of its path, because clients of S3 change such keys",
            )
        ),
    ),
]
"""Address of an object or of a folder in the job's object store, `s3://bucket/key`, or of a whole bucket,
`s3://bucket`."""

HttpUrl = Annotated[str, Field(max_length=512, pattern=HTTP_URL_PATTERN)]
"""An `http://` or `https://` address with an optional path."""


def int_or_string(pattern: str, *, least: int, most: int) -> dict[str, Any]:
    """Return the schema of a field that takes an integer from ``least`` to ``most``, or a string that matches
    ``pattern``."""
    return {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "minimum": least,
        "maximum": most,
        "maxLength": QUANTITY_LENGTH,
        "pattern": pattern,
    }


QUANTITY_LENGTH = 16
"""Largest number of characters of a string in a field that takes an integer or a string. An example of such a string is
the quantity `1.5Gi`."""

LabelKey = str
"""Key of a label or of an annotation in a map. The type has no bounds, because a structural schema can't bound the keys
of a map. Where the keys must be valid, CEL rules check them, for example in `pod_template.py`."""
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
"""Regular expression that the value of a label must match. The value may be empty."""
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""Regular expression that a DNS label (RFC 1123) must match. Names of namespaces and volumes, for example, are DNS
labels."""
LABEL_LENGTH = 63
"""Largest number of characters of a label's value, and of a DNS label."""

LabelValue = Annotated[str, Field(max_length=LABEL_LENGTH, pattern=LABEL_VALUE_PATTERN)]
"""The value of a Kubernetes label, which may be empty."""
DnsLabel = Annotated[str, Field(min_length=1, max_length=LABEL_LENGTH, pattern=DNS_LABEL_PATTERN)]
"""A name that is a DNS label (RFC 1123): `a-z`, `0-9` and `-`, at most 63 characters."""
QualifiedName = Annotated[str, Field(min_length=1, max_length=317)]
"""Key of a label or of a taint, with an optional prefix, for example `nvidia.com/gpu`. The type checks only the length.
317 characters are enough for a prefix of 253 characters, the slash, and a name of 63 characters."""
