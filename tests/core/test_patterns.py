"""No field of the spec that has a pattern accepts a control character, because a terminal that shows the value would
obey the character. Every pattern is described by a phrase, so that no message of `finetune validate` shows a regular
expression."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.pattern_meanings import PATTERN_MEANINGS
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart

parser: Any = importlib.import_module("re._parser")
"""Python's parser of regular expressions. It is declared as Any, because the module has no type information."""
CONTROL = frozenset({*range(0x20), *range(0x7F, 0xA0)})


def patterns(schema: Any, path: str = "spec") -> Iterator[tuple[str, str]]:
    """Yield every regular expression in ``schema`` that a text must match, with its place in the schema, such as
    `spec.properties.storage.properties.uri`. ``path`` is the place of ``schema`` itself."""
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
    """Return the control characters that can occur in a text that matches ``tokens``, a parsed regular expression. A
    category of characters, such as the digits, counts as all control characters."""
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


def test_every_pattern_has_words_and_no_others_have() -> None:
    assert set(ALL.values()) == set(PATTERN_MEANINGS)


@pytest.mark.parametrize("pattern", [pattern for pattern, words in PATTERN_MEANINGS.items() if "such as " in words])
def test_the_words_of_a_pattern_name_values_that_match_it(pattern: str) -> None:
    shown = PATTERN_MEANINGS[pattern].partition("such as ")[2].partition(",")[0]
    for value in shown.split(" or "):
        assert re.fullmatch(pattern, value.strip('"')), value


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


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("storage.endpoint", "http://minio:9000/", None),
        (
            "storage.endpoint",
            "http://user:pw@minio:9000",
            "must be an address such as http://minio.storage.svc:9000, wit",
        ),
        (
            "storage.endpoint",
            "http://minio/path",
            "must be an address such as http://minio.storage.svc:9000, without us",
        ),
        (
            "storage.uri",
            "bucket/runs",
            "must be an address such as s3://bucket/folder/file.jsonl, without blanks, of at",
        ),
        ("storage.uri", "s3://bucket/a/../b", "the address must not have `.` or `..` as a part of its path, because"),
        ("model.s3.uri", "s3://bucket/.", "the address must not have `.` or `..` as a part of its path, because"),
        ("model.s3.uri", "s3://bucket/.a/..b/c..", None),
        (
            "dataset.train",
            {"volume": {"claimName": "rows", "path": "/train.jsonl"}},
            "must be a path inside the volume or the repository without a leading slash, such as rows/train.jsonl, of",
        ),
        (
            "evaluation.require",
            [{"score": "perplexity", "atMost": "60%"}],
            'must be a decimal number in quotes, such as "0.8", of at most 32 characters',
        ),
        ("training.learningRate", "fast", 'must be a decimal number from 0 on in quotes, such as "0.05" or "1e-4"'),
        ("resources.memory", "5 GB", "must be a whole number between 104857600 and "),
    ],
)
def test_a_malformed_text_is_refused_with_a_sentence_and_no_regular_expression(
    path: str, text: Any, sentence: str | None
) -> None:
    found = [problem.message for problem in problems(path, text)]
    assert not any("[" in message for message in found)
    assert len(found) == (sentence is not None)
    assert all(message.startswith(sentence or "") for message in found)


def problems(path: str, text: Any) -> list[Any]:
    """Return the problems for which the API server or the operator would refuse the quickstart with ``text`` at
    ``path``."""
    document = quickstart(path, text)
    if path.startswith("model"):
        document["spec"]["model"] = {"s3": {"uri": text}}
    return list(validate_job(document).problems)
