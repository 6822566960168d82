"""Generates docs/api.md, the API reference, from the pydantic models.

`make docs` runs this program. tests/core/test_reference.py checks that the committed file is the one that the models
generate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune_core.api.attempt_causes import CAUSES, DISRUPTIONS
from finetune_core.api.condition_reasons import CONDITIONS, NOTHING, REASONS, STATES
from finetune_core.api.job import API_VERSION, KIND, NAME_RULE, SHORT_NAME, printer_columns
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import FineTuneJobStatus
from finetune_core.validation.runnable import NOT_YET

Schema = dict[str, Any]

REFERENCE_FILE = "api.md"
FOLDED = frozenset({"spec.podTemplate.affinity"})
"""Paths of sections whose subsections get no heading and no table of their own. The fields of the subsections are
listed in the section's table, because no subsection has more than three fields."""

_INTRODUCTION = f"""\
# API reference

<!-- Generated from core/finetune_core/api by `make docs`; do not edit. -->

`{API_VERSION}`, kind `{KIND}`, short name `{SHORT_NAME}`. `kubectl explain {SHORT_NAME}.spec.training` says the same.

A field is required, has a default, or is optional. The API server fills in defaults, so that `kubectl get -o yaml`
shows the values that are used. The operator never writes a job's `spec`, labels, annotations or finalizers. `null`
counts as absent. Decimals are strings (`"1e-4"`), because some tools change numbers with fractions. Where *exactly one*
member of a section must be set, as in a Kubernetes volume, the rule stands below the section's table.

The API server refuses a job, or an update of a job, that violates the tables and rules on this page. A refused update
does not change the running job. The operator refuses a job that it can't run with `Accepted=False`, `Stalled=True` and
the field's path. `finetune validate FILE...` finds the problems of both kinds without a cluster ([how](validate.md)).

`metadata.name`: {NAME_RULE[1].removeprefix("`metadata.name` ")}.
"""

_IMMUTABLE = "must not change after creation; create a new FineTuneJob"


def reference() -> str:
    """Return the text of docs/api.md."""
    spec, status = openapi_schema(FineTuneJobSpec), openapi_schema(FineTuneJobStatus)
    parts = [_INTRODUCTION, "\n## spec\n", *_sections(spec, "spec"), *_not_yet(), "\n## status\n"]
    parts += [*_sections(status, "status"), *_conditions(), *_causes(), *_columns()]
    return "\n".join(parts)


def _sections(schema: Schema, path: str) -> Iterator[str]:
    """Yield the Markdown lines about the section at ``path``, whose schema is ``schema``: its heading, its description,
    the table of its fields and the list of its rules. The same follows for each of its subsections, except where the
    section is in FOLDED: then the fields of its subsections are further lines of the section's own table. `reference`
    writes the headings of `spec` and `status`."""
    if path.count(".") > 0:
        yield f"\n### {path}\n"
    yield schema.get("description", "") + "\n"
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    yield from _rows(schema, "", folded=path in FOLDED)
    yield from _rules(schema)
    if path in FOLDED:
        return
    for name, child in schema["properties"].items():
        below = child["items"] if child.get("type") == "array" else child
        if below.get("properties"):
            yield from _sections(below, f"{path}.{name}" + ("[]" if below is not child else ""))


def _rows(schema: Schema, prefix: str, *, folded: bool) -> Iterator[str]:
    required = schema.get("required", ())
    for name, child in schema["properties"].items():
        default = "**required**" if name in required else _default(child)
        yield f"| `{prefix}{name}` | {_type(child)} | {default} | {_cell(child.get('description', ''))} |"
        below = child["items"] if child.get("type") == "array" else child
        if folded and below.get("properties"):
            yield from _rows(below, f"{prefix}{name}{'[]' if below is not child else ''}.", folded=True)


def _type(schema: Schema) -> str:
    """Return a field's type and bounds in a few words, for example `integer, 1 to 512`."""
    if schema.get("x-kubernetes-int-or-string"):
        word = schema["pattern"].strip("^$")
        return f"integer or `{word}`" if word.isalpha() else "quantity"
    kind = schema["type"]
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if kind == "integer":
        top = schema.get("maximum")
        return f"integer, {schema.get('minimum', 0)} to {top}" if top is not None else "integer"
    if kind == "array":
        least = f"{schema['minItems']} to " if "minItems" in schema else "at most "
        return f"list of {schema['items']['type']}s, {least}{schema['maxItems']}"
    if "additionalProperties" in schema:
        return f"map of strings, at most {schema['maxProperties']}"
    if kind == "string" and schema.get("format") == "date-time":
        return "time"
    if kind == "string":
        return f"string, at most {schema['maxLength']}"
    return str(kind)


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    if value == "":
        return '`""`'
    if isinstance(value, dict) and value:
        return "see below"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def _rules(schema: Schema) -> Iterator[str]:
    messages = [rule["message"] for rule in schema.get("x-kubernetes-validations", ())]
    fixed = [message.split("`")[1] for message in messages if message.endswith(_IMMUTABLE)]
    others = [message for message in messages if not message.endswith(_IMMUTABLE)]
    if others:
        yield "\nRules:\n"
        yield from (f"- {message}" for message in others)
    if fixed:
        yield "\nImmutable after creation: " + ", ".join(f"`{name}`" for name in fixed) + "."
        yield "\nEverything else may change at any time. Changes that concern pods take effect with the next attempt."


def _not_yet() -> Iterator[str]:
    if not NOT_YET:
        return
    yield "\n## What this version can't run yet\n"
    yield "The schema has these fields. A job with another value ends with `Accepted=False` and `Stalled=True`.\n"
    yield "| field | must |"
    yield "|---|---|"
    yield from (f"| `spec.{field.path}` | {field.must} |" for field in NOT_YET)


def _conditions() -> Iterator[str]:
    yield "\n## Conditions\n"
    yield "Every condition is present from the first status write, with `observedGeneration`. The message of a"
    yield "condition is a sentence that names the pod, field or file that the condition is about.\n"
    yield from (f"- **{kind}**: {meaning}" for kind, meaning in CONDITIONS.items())
    yield "\n| condition | status | reason | meaning | what to do |"
    yield "|---|---|---|---|---|"
    for kind, statuses in STATES.items():
        for status, reasons in statuses.items():
            for reason in reasons:
                explained = REASONS[reason]
                yield f"| {kind} | {status} | {reason} | {_cell(explained.meaning)} | {_cell(explained.advice)} |"


def _causes() -> Iterator[str]:
    yield "\n## Reasons of attempts\n"
    yield "`status.attempts` has these reasons in addition to the reasons that the whole job ends with.\n"
    yield "| reason | verdict | meaning | what to do |"
    yield "|---|---|---|---|"
    for cause, (verdict, explained) in CAUSES.items():
        yield f"| {cause} | {verdict} | {_cell(explained.meaning)} | {_cell(explained.advice)} |"
    yield from (f"| {reason} | Free | {meaning} | {NOTHING} |" for reason, meaning in DISRUPTIONS.items())


def _columns() -> Iterator[str]:
    yield f"\n## Columns of `kubectl get {SHORT_NAME}`\n"
    yield "| column | from | |"
    yield "|---|---|---|"
    for column in printer_columns():
        wide = "with `-o wide`" if column.get("priority") else ""
        yield f"| {column['name']} | `{column['jsonPath']}` | {wide} |"
    yield ""


def _cell(text: str) -> str:
    """Return ``text`` for a cell of a Markdown table. `|` is escaped everywhere. `<` is escaped outside of code,
    because in Markdown it can begin an HTML tag."""
    parts = text.replace("|", "\\|").replace("\n", " ").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def main() -> None:
    """Write docs/api.md into the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description="Write the API reference of FineTuneJob.",
        epilog="example: python -m finetune_core.api.reference docs",
    )
    parser.add_argument("folder", type=Path, help="folder for api.md")
    folder: Path = parser.parse_args().folder
    (folder / REFERENCE_FILE).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
