"""After an upgrade of the CRD, a job in which a field still has an older type can be cancelled, and its status can be
written. The settings of its training still can't be changed.

The CRD of these tests has a group of its own, so that no other test sees this CRD. The CRD first has the older types,
then jobs are created, and then the CRD gets the schema of this version, as in an upgrade of the chart.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.crd import custom_resource_definition
from finetune_core.api.job import PLURAL, VERSION
from finetune_core.api.older_specs import OTHER_TYPES
from tests.cluster import Cluster
from tests.cluster.waiting import wait_for
from tests.core.jobs import quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

GROUP = "older.finetune.dev"
RESOURCE = f"{PLURAL}.{GROUP}"
OLDER_VALUES: Mapping[str, Sequence[Any]] = {"dataset.task": ["None", "ViGGO"]}
"""Values of the older type, by the path of each field that had another type."""
CASES = {
    f"{path.replace('.', '-')}-{value}".lower(): (path, value)
    for path, values in OLDER_VALUES.items()
    for value in values
}


def crd(spec: dict[str, Any]) -> str:
    """Return a CRD of the tests' group, as YAML. ``spec`` is its schema of the field `spec`."""
    manifest = custom_resource_definition()
    manifest["metadata"]["name"] = RESOURCE
    manifest["spec"]["group"] = GROUP
    manifest["spec"]["names"].pop("categories")
    manifest["spec"]["names"].pop("shortNames")
    manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = spec
    return yaml.safe_dump(manifest)


def spec_schema() -> dict[str, Any]:
    """Return the schema of `spec` in the CRD of this version."""
    version = custom_resource_definition()["spec"]["versions"][0]
    schema: dict[str, Any] = copy.deepcopy(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return schema


def older_schema(schema: Any) -> Any:
    """Return ``schema`` with the older types and without rules."""
    older = without_rules(schema)
    for path in OTHER_TYPES:
        *parents, name = path.split(".")
        section = older
        for parent in parents:
            section = section["properties"][parent]
        section["properties"][name] = {"type": "string"}
    return older


def without_rules(schema: Any) -> Any:
    if isinstance(schema, list):
        return [without_rules(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_rules(value) for key, value in schema.items() if key != "x-kubernetes-validations"}


def manifest(name: str, path: str, value: Any) -> str:
    """Return the job ``name``, in which the field at ``path`` has ``value``, as JSON."""
    job = quickstart(path, value)
    return json.dumps(job | {"apiVersion": f"{GROUP}/{VERSION}", "metadata": {"name": name}})


@pytest.fixture(scope="module")
def upgraded(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with a job for each of `CASES`, after the upgrade of the CRD."""
    kubectl: Path = cluster.layout.programs / "kubectl"

    def accepted(*arguments: str, stdin: str = "") -> bool:
        return cluster.run([kubectl, *arguments], check=False, stdin=stdin).returncode == 0

    cluster.kubectl("create", "-f", "-", stdin=crd(older_schema(spec_schema())))
    try:
        wait_for("the older CRD to be served", lambda: accepted("get", RESOURCE), 60)
        for name, (path, value) in CASES.items():
            cluster.kubectl("create", "-f", "-", stdin=manifest(name, path, value))
        cluster.kubectl("replace", "-f", "-", stdin=crd(spec_schema()))
        today = manifest("today", "dataset.task", {"name": "ViGGO"})
        wait_for("the new CRD to be served", lambda: accepted("create", "--dry-run=server", "-f", "-", stdin=today), 60)
        yield cluster
    finally:
        cluster.kubectl("delete", "crd", RESOURCE)


def patch(cluster: Cluster, name: str, change: Any, *options: str, kind: str = "merge") -> str:
    """Send ``change`` to the API server, as a patch of the stored job ``name``. Return the error that kubectl prints if
    the server refuses the patch, and an empty text if it accepts the patch."""
    kubectl = cluster.layout.programs / "kubectl"
    done = cluster.run(
        [kubectl, "patch", RESOURCE, name, f"--type={kind}", f"--patch={json.dumps(change)}", *options], check=False
    )
    return done.stderr if done.returncode else ""


def test_each_field_that_had_another_type_has_older_values() -> None:
    assert OLDER_VALUES.keys() == OTHER_TYPES.keys()


@pytest.mark.parametrize("name", CASES)
def test_its_status_is_written(upgraded: Cluster, name: str) -> None:
    change = [{"op": "add", "path": "/status", "value": {"observedGeneration": 7}}]
    assert patch(upgraded, name, change, "--subresource=status", kind="json") == ""
    stored = upgraded.get(RESOURCE, name)
    path, value = CASES[name]
    *parents, field = path.split(".")
    section = stored["spec"]
    for parent in parents:
        section = section[parent]
    assert section[field] == value
    assert stored["status"]["observedGeneration"] == 7


@pytest.mark.parametrize("name", CASES)
def test_it_can_be_cancelled(upgraded: Cluster, name: str) -> None:
    assert patch(upgraded, name, {"spec": {"runPolicy": {"cancel": True}}}) == ""
    assert upgraded.get(RESOURCE, name)["spec"]["runPolicy"]["cancel"] is True


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dataset": {"train": {"s3": {"uri": "s3://finetune/data/other.jsonl"}}}}, "`dataset` must not change"),
        ({"dataset": {"validation": None}}, "`dataset` must not change"),
        ({"dataset": {"test": {"s3": {"uri": "s3://finetune/data/other.jsonl"}}}}, "`dataset` must not change"),
        ({"dataset": {"task": "GSM8K"}}, "spec.dataset.task"),
        ({"training": {"seed": 7}}, "`training` must not change"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_its_training_stays_immutable(upgraded: Cluster, name: str, section: Any, message: str) -> None:
    before = upgraded.get(RESOURCE, name)["spec"]
    assert message in patch(upgraded, name, {"spec": section})
    assert upgraded.get(RESOURCE, name)["spec"] == before


def test_a_new_job_with_an_older_value_is_refused(upgraded: Cluster) -> None:
    kubectl = upgraded.layout.programs / "kubectl"
    for path, value in CASES.values():
        done = upgraded.run(
            [kubectl, "create", "--dry-run=server", "-f", "-"], check=False, stdin=manifest("new", path, value)
        )
        assert done.returncode != 0
        assert f"spec.{path}" in done.stderr
