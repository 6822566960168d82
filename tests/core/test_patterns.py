"""No field of the spec that has a pattern accepts a control character, because a terminal that shows the value would
obey the character."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart

parser: Any = importlib.import_module("re._parser")
"""Python's parser of regular expressions. It is declared as Any, because the module has no type information."""
CONTROL = frozenset({*range(0x20), *range(0x7F, 0xA0)})


def patterns(schema: Any, path: str = "spec") -> Iterator[tuple[str, str]]:
    """Yield the path and the regular expression of every field below ``schema`` whose text must match a regular
    expression."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield path, schema["pattern"]
        for key, item in schema.items():
            yield from patterns(item, f"{path}.{key}")
    elif isinstance(schema, list):
        for item in schema:
            yield from patterns(item, path)


ALL = dict(patterns(openapi_schema(FineTuneJobSpec)))


def accepted(tokens: Any) -> set[int]:
    """Return the control characters that a text may contain and still match ``tokens``, a parsed regular expression."""
    found: set[int] = set()
    for operation, value in tokens:
        name = str(operation)
        if name == "IN":
            found |= _of_class(value)
        elif name == "LITERAL":
            found |= {value} & CONTROL
        elif name in ("ANY", "NOT_LITERAL", "CATEGORY"):
            found |= CONTROL - ({value} if name == "NOT_LITERAL" else set())
        else:
            for part in value if isinstance(value, tuple | list) else ():
                if isinstance(part, parser.SubPattern):
                    found |= accepted(part)
                elif isinstance(part, list):
                    for branch in part:
                        found |= accepted(branch)
    return found


def _of_class(items: Any) -> set[int]:
    listed: set[int] = set()
    negated = False
    for operation, value in items:
        name = str(operation)
        negated = negated or name == "NEGATE"
        if name == "LITERAL":
            listed.add(value)
        elif name == "RANGE":
            listed |= set(range(value[0], value[1] + 1))
        elif name == "CATEGORY":
            listed |= CONTROL
    return set(CONTROL) - listed if negated else set(CONTROL) & listed


def test_there_are_patterns_to_look_at() -> None:
    assert len(ALL) > 20
    assert accepted(parser.parse("^[^ ]+$")) == CONTROL - {0x20}
    assert accepted(parser.parse("^a(b|[^/]*)?$")) == CONTROL


@pytest.mark.parametrize("path", ALL)
def test_a_pattern_accepts_no_control_character(path: str) -> None:
    assert accepted(parser.parse(ALL[path])) == set()


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x7f", "\x85", "\x9b", "\x00", "\n", "\xa0", " "])
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("storage.uri", "s3://bucket/a{}b"),
        ("storage.endpoint", "http://minio{}:9000"),
        ("model.s3.uri", "s3://bucket/a{}b"),
        ("podTemplate.image", "registry/trainer{}:1"),
    ],
)
def test_an_address_with_a_control_character_is_refused(path: str, text: str, character: str) -> None:
    assert problems(path, text.format("")) == []
    assert problems(path, text.format(character)) != []


def problems(path: str, text: str) -> list[Any]:
    """Return the problems for which the API server or the operator would refuse the quickstart with ``text`` at
    ``path``."""
    document = quickstart(path, text)
    if path.startswith("model"):
        document["spec"]["model"] = {"s3": {"uri": text}}
    return list(validate_job(document).problems)
