"""A job that an older version of the CRD accepted is read with the types of this version."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finetune_core.api import FineTuneJob
from finetune_core.api.crd import CRD_FILE, custom_resource_definition
from finetune_core.api.older_specs import OTHER_TYPES, present_manifest
from finetune_core.tasks import TASKS
from tests.core.jobs import EXAMPLES, quickstart

OLDER = ("2433999", "5b68d5f")
"""Commits of older versions. Clusters may still have jobs that were stored with the CRDs of these versions."""


def types(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the JSON type of ``schema`` itself, whose path is ``path``, and of every field, list item and
    map value in it."""
    yield path, str(schema.get("type", "integer or string"))
    for name, inner in schema.get("properties", {}).items():
        yield from types(inner, f"{path}.{name}" if path else name)
    for key, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(schema.get(key), dict):
            yield from types(schema[key], path + suffix)


def spec_types(manifest: dict[str, Any]) -> dict[str, str]:
    return dict(types(manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]))


@pytest.mark.parametrize("commit", OLDER)
def test_each_field_whose_type_has_changed_is_read(commit: str) -> None:
    shown = subprocess.run(
        ["git", "show", f"{commit}:crds/{CRD_FILE}"], cwd=EXAMPLES.parent, capture_output=True, text=True, check=False
    )
    if shown.returncode != 0:
        # The older CRD comes from the git history, which a shallow clone or a source archive does not have.
        pytest.skip(f"the history does not reach back to {commit}")
    old, new = spec_types(yaml.safe_load(shown.stdout)), spec_types(custom_resource_definition())
    assert {path for path in old.keys() & new.keys() if old[path] != new[path]} == OTHER_TYPES.keys()


@pytest.mark.parametrize("name", ["ViGGO", "GSM8K", "SQL"])
def test_the_name_of_a_task_becomes_the_task_of_that_name(name: str) -> None:
    assert name in TASKS
    stored = quickstart("dataset.task", name)
    before = copy.deepcopy(stored)
    job = FineTuneJob.model_validate(present_manifest(stored))
    assert job == FineTuneJob.model_validate(quickstart("dataset.task", {"name": name}))
    assert stored == before, "other readers may share the manifest"


def test_the_former_default_none_is_no_task() -> None:
    stored = quickstart("dataset.task", "None")
    assert FineTuneJob.model_validate(present_manifest(stored)).spec.dataset.task is None


@pytest.mark.parametrize("spec", [None, [], {}, {"dataset": None}, {"dataset": "x"}, {"dataset": {"task": 3}}])
def test_a_spec_of_another_shape_stays_as_it_is(spec: object) -> None:
    assert present_manifest({"spec": spec}) == {"spec": spec}


def test_a_spec_of_this_version_stays_as_it_is() -> None:
    for stored in (quickstart(), quickstart("dataset.task", {"name": "ViGGO"})):
        assert present_manifest(stored) == stored
