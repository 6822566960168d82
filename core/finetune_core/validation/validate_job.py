"""Validates a whole job: first as the API server would on `kubectl apply`, then as the operator would.

The regular expressions in `dataset.task.pattern` and `lora.targetModules` are compiled here too. In a cluster the API
server and the operator do not compile these expressions, but the check before the first attempt does.

The input is the parsed document, and for an update also the stored spec. The result lists the problems with their
paths. Where the API server would accept the job, the result also contains the spec as the API server would store it.
`finetune validate` calls this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_core.api.base import DNS_LABEL_PATTERN, LABEL_LENGTH, LABEL_VALUE_PATTERN
from finetune_core.api.job import API_VERSION, KIND, NAME_RULE, OTHER_JOB_RULE
from finetune_core.api.pod_template import LABEL_KEY
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.patterns import compile_pattern
from finetune_core.target_modules import compile_entry, is_pattern
from finetune_core.validation.cel_rules import check_rules, check_rules_beside, holds
from finetune_core.validation.defaults import defaulted
from finetune_core.validation.precise import precise
from finetune_core.validation.problems import FieldPath, Problem, Refusal, unknown_field
from finetune_core.validation.runnable import unrunnable
from finetune_core.validation.structure import check_structure, is_json

ANNOTATIONS_LIMIT_BYTES = 262_144
"""Largest number of bytes that the keys and values of an object's annotations may have together, as in the API
server."""
JOB_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
METADATA_FIELDS = (
    "name", "namespace", "labels", "annotations", "generateName", "finalizers", "ownerReferences", "uid",
    "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
    "managedFields", "selfLink",
)  # fmt: skip
"""The fields of Kubernetes' ObjectMeta. The API server refuses any other field in `metadata`."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """The problems of a job, and the spec that the API server would store."""

    problems: list[Problem]
    stored: dict[str, Any] | None = None
    """The spec with all defaults, or None when the API server refuses the job."""


def is_job(document: Any) -> bool:
    """Return whether ``document`` is a FineTuneJob of the API version that this program knows."""
    return isinstance(document, dict) and document.get("kind") == KIND and document.get("apiVersion") == API_VERSION


def validate_job(document: dict[str, Any], *, old_spec: dict[str, Any] | None = None) -> ValidationResult:
    """Check ``document``, a whole job. The result contains the problems for which the API server, the operator or the
    preflight check would refuse the job, and the spec that the API server would store. With ``old_spec``, the document
    is checked as an update of a stored job that has this spec."""
    problems = [Problem((key,), unknown_field(str(key), JOB_FIELDS)) for key in document if key not in JOB_FIELDS]
    problems += _metadata_problems(document.get("metadata"))
    if document.get("spec") is None:
        return ValidationResult([*problems, Problem(("spec",), "must be set")])
    verdict = validate_spec(document["spec"], old_spec=old_spec)
    if verdict.stored is not None and not problems:
        whole = {"metadata": document["metadata"], "spec": verdict.stored}
        if not holds(OTHER_JOB_RULE[0], whole):
            path: FieldPath = ("spec", "model", "adapter", "job", "name")
            problems.append(Problem(path, OTHER_JOB_RULE[1].split("` ", 1)[1]))
    return ValidationResult([*problems, *verdict.problems], None if problems else verdict.stored)


def validate_spec(spec: Any, *, old_spec: dict[str, Any] | None = None) -> ValidationResult:
    """Check ``spec``, which may be any parsed value. The result contains the problems for which the API server, the
    operator or the preflight check would refuse a job with this spec, and the spec that the API server would store.
    With ``old_spec``, ``spec`` is checked as an update of this stored spec."""
    schema = openapi_schema(FineTuneJobSpec)
    model, problems = check_structure(spec)
    if model is None:
        if is_json(spec):
            broken = [problem.path for problem in problems]
            filled = defaulted(schema, spec)
            for problem in check_rules_beside(schema, filled, ("spec",), broken):
                problems += precise(problem, filled)
        return ValidationResult(problems)
    stored = model.to_json()
    if old_spec is None:
        problems = list(check_rules(schema, stored, ("spec",)))
    else:
        problems = list(check_rules(schema, stored, ("spec",), old_spec))
    if problems:
        return ValidationResult([named for problem in problems for named in precise(problem, stored)])
    refused = [Problem(_split(error.subject), error.problem, Refusal.OPERATOR) for error in unrunnable(model)]
    return ValidationResult([*refused, *_pattern_problems(model)], stored)


def _pattern_problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """Yield a problem where RE2 can't read `dataset.task.pattern`, or a regular expression in `lora.targetModules`."""
    task = spec.dataset.task
    if task is not None and task.pattern is not None:
        try:
            compile_pattern(task.pattern)
        except UserError as error:
            yield Problem(_split(f"spec.{error.subject}"), error.problem, Refusal.CHECK)
    for place, entry in enumerate(spec.lora.target_modules if spec.lora is not None else ()):
        try:
            if is_pattern(entry):
                compile_entry(entry)
        except UserError as error:
            yield Problem(_split(f"spec.{error.subject}[{place}]"), f"{entry!r} {error.problem}", Refusal.CHECK)


def _metadata_problems(metadata: Any) -> Iterator[Problem]:
    """Yield the problems of a job's ``metadata``: of its name, namespace, labels and annotations, and of unknown
    fields."""
    if not isinstance(metadata, dict):
        yield Problem(("metadata",), "must be an object with a `name`")
        return
    path: FieldPath = ("metadata",)
    for key in metadata:
        if key not in METADATA_FIELDS:
            yield Problem((*path, key), unknown_field(str(key), METADATA_FIELDS))
    name = metadata.get("name")
    if not isinstance(name, str) or not name:
        yield Problem((*path, "name"), "must be set, and a string")
    elif not holds(NAME_RULE[0], {"metadata": {"name": name}}):
        yield Problem((*path, "name"), NAME_RULE[1].split("` ", 1)[1])
    namespace = metadata.get("namespace")
    if namespace is not None and not (isinstance(namespace, str) and _is_label(DNS_LABEL_PATTERN, namespace)):
        yield Problem((*path, "namespace"), "must hold only a-z, 0-9 and '-', at most 63 characters")
    for field in ("labels", "annotations"):
        yield from _label_problems((*path, field), metadata.get(field), values_are_labels=field == "labels")


def _label_problems(path: FieldPath, labels: Any, *, values_are_labels: bool) -> Iterator[Problem]:
    if labels is None:
        return
    if not isinstance(labels, dict):
        yield Problem(path, "must be an object of strings")
        return
    for key, value in labels.items():
        if not isinstance(key, str) or not re.fullmatch(LABEL_KEY, key if values_are_labels else str(key).lower()):
            yield Problem((*path, str(key)), "must be a key such as `team` or `example.com/team`")
        elif value is not None and not isinstance(value, str):
            yield Problem((*path, key), "must be a string; put numbers, true and false in quotes")
        elif values_are_labels and not _is_label(LABEL_VALUE_PATTERN, value or ""):
            yield Problem(
                (*path, key),
                "must be at most 63 characters of a-z, A-Z, 0-9, '-', '_' and '.', and begin and end alike",
            )
    size = sum(len(str(key).encode()) + len(str(value).encode()) for key, value in labels.items())
    if not values_are_labels and size > ANNOTATIONS_LIMIT_BYTES:
        yield Problem(path, f"must have at most {ANNOTATIONS_LIMIT_BYTES} bytes together")


def _is_label(pattern: str, value: str) -> bool:
    """Return whether ``value`` matches ``pattern`` and has at most 63 characters."""
    return len(value) <= LABEL_LENGTH and re.fullmatch(pattern, value) is not None


def _split(dotted: str) -> FieldPath:
    """Return the parts of ``dotted``, the path of a field such as `spec.evaluation.require[0].atLeast`.

    The errors of `unrunnable` have a path in this form as their subject.
    """
    parts: list[str | int] = []
    for part in dotted.split("."):
        places = re.search(r"(?:\[[0-9]+\])*\Z", part)
        assert places is not None
        parts += [part[: places.start()], *map(int, re.findall("[0-9]+", places[0]))]
    return tuple(parts)
