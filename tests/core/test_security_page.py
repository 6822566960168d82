"""For each attack, docs/security.md either names an existing test or says that nothing defends against the attack.

The tests of attacks for which there is no other test file are in this file.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NamedTuple

import pytest

from finetune_core.api import FineTuneJob
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.resolve import resolve
from finetune_operator.objects.backends.pytorchjob import build_pytorchjob
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_config_map, build_preflight_pod
from tests.core.test_docs import DOCS, ROOT, text_of
from tests.operator.builders import job_manifest

PAGE = DOCS / "security.md"
ATTACKERS = ("Anonymous", "A pod of a job", "An editor of a namespace", "Another tenant", "The operator itself")
HEADER = ("| what is tried | what holds | shown by |", "|---|---|---|")
"""The first two lines of every table of the page."""
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


class Line(NamedTuple):
    """A line of a table of the page: the attacker, the attack, the defence, and the cell that names the tests."""

    attacker: str
    attempt: str
    holds: str
    shown_by: str


def lines() -> list[Line]:
    """Return all lines of the tables. A line that does not have exactly three cells gets empty cells, so that its test
    fails."""
    found = []
    for section in text_of(PAGE).split("\n## ")[1:]:
        title = section.partition("\n")[0]
        rows = (line.strip() for line in section.splitlines() if "|" in line and line.strip() not in HEADER)
        for row in rows:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            found.append(Line(title, *cells) if len(cells) == len(Line._fields) - 1 else Line(title, row, "", ""))
    return found


def test_every_attacker_has_a_table() -> None:
    told = {line.attacker for line in lines()}
    assert len(told) == len(ATTACKERS) == text_of(PAGE).count("\n".join(HEADER))
    assert all(any(title.startswith(attacker) for title in told) for attacker in ATTACKERS)


@pytest.mark.parametrize("line", lines(), ids=lambda line: line.attempt[:60])
def test_every_line_names_a_test_or_says_that_nothing_defends(line: Line) -> None:
    named = NAMED.findall(line.shown_by)
    assert line.holds, "the line has not three cells"
    assert bool(named) != line.holds.startswith("Not defended"), "either a test, or the sentence, and not both"
    assert NAMED.sub("", line.shown_by).strip(" ,") == "", "the cell has names of tests only"


def test_every_named_test_exists() -> None:
    defined = {
        (file.name, name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", text_of(file), re.MULTILINE)
    }
    assert set(NAMED.findall(text_of(PAGE))) - defined == set()


def test_the_page_says_what_creating_a_job_equals() -> None:
    text = " ".join(text_of(PAGE).split())
    assert "Whoever may create a FineTuneJob in a namespace has every Secret, ConfigMap and claim" in text
    assert "can act as each of its service accounts" in text


def test_the_trainer_never_trusts_remote_code() -> None:
    calls = []
    for path in sorted((ROOT / "trainer_image/finetune_trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
                calls.append(path.name)
            if isinstance(node, ast.Attribute | ast.Name):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                assert name not in ("pickle", "cPickle", "dill", "load_extension"), f"{path}: {name}"
    assert calls, "no call says it, so this test looks at the wrong thing"


def test_no_reference_of_a_job_names_a_namespace() -> None:
    def names(schema: Any) -> set[str]:
        if not isinstance(schema, dict):
            return set()
        own = set(schema.get("properties", {}))
        return own.union(*(names(item) for item in schema.values()), *map(names, schema.get("properties", {}).values()))

    fields = names(openapi_schema(FineTuneJobSpec))
    assert "credentialsSecretRef" in fields
    assert {name for name in fields if "namespace" in name.lower()} <= {"namespaces", "namespaceSelector"}


def test_no_object_that_the_operator_makes_contains_a_key() -> None:
    """The operator never reads the Secrets that a job names, so the objects that it makes can contain only the names of
    these Secrets, and not their content."""
    job = FineTuneJob.model_validate(job_manifest())
    attempt = AttemptSpec(number=1, name="attempt", image="trainer:1", report_base_url="https://operator:8443")
    check = PreflightSpec(number=1, name="check", image="trainer:1")
    config = resolve(job, report=None)
    made = [
        build_pytorchjob(job, attempt),
        build_preflight_pod(job, check),
        build_preflight_config_map(job, check, config),
    ]
    text = json.dumps(made)
    assert "AWS_SECRET_ACCESS_KEY" not in text
    assert "secretKeyRef" not in text
    assert '"secretName": "storage-credentials"' in text
