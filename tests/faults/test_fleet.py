"""R1 and R15 of docs/performance.md: the operator is killed 50 times at random times while it manages 300 jobs, and the
operator is upgraded and rolled back while jobs run."""

from __future__ import annotations

import random
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api import GROUP, PLURAL, VERSION
from finetune_operator.kube.client import FIELD_MANAGER
from finetune_operator.objects.labels import ATTEMPT, JOB_NAME
from tests.faults.operators import OperatorProcess
from tests.faults.world import World, condition, job, settled
from tests.operator.builders import REPOSITORY
from tests.operator.skewed_statuses import SKEWS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

CONVERGED_SECONDS = 30
FIVE_JOBS = tuple(f"job-{number}" for number in range(5))
FIRST = "2433999"
"""Commit of the first version that ran jobs. This version had no leader election and no `runPolicy.cancel`, and its
status had other fields."""
LATER = "5b68d5f"
"""Commit of a later version, which obeys `runPolicy.cancel` and runs the preflight check before a job's first
attempt."""


@pytest.mark.long
def test_random_kills_double_and_lose_no_job(world: World) -> None:
    choose = random.Random(5)
    namespace = world.namespace()
    lives = [("done",), ("exit-75", "done"), ("drained", "done"), ("exit-64",)]
    jobs = [job(*lives[number % 4], name=f"job-{number}") for number in range(300)]
    world.create(namespace, *jobs)
    kills = 0
    next_kill = last_kill = time.monotonic()

    def all_killed() -> bool:
        nonlocal kills, next_kill, last_kill
        world.keep_operator_alive()
        if time.monotonic() > next_kill:
            world.operator.stop()
            kills, last_kill = kills + 1, time.monotonic()
            next_kill = last_kill + choose.uniform(0.5, 4)
        return kills == 50

    began = time.monotonic()
    world.wait("50 kills", all_killed, 600, interval=0.1)
    over = ended_attempts(world, namespace)
    world.keep_operator_alive()
    world.wait(
        "the ended attempts to be recorded", lambda: over <= recorded_attempts(world, namespace), 3 * CONVERGED_SECONDS
    )
    print(f"{len(over)} ended attempts are recorded {time.monotonic() - last_kill:.1f} s after the last kill")
    world.wait("300 jobs to end", lambda: all(settled(found) for found in world.jobs(namespace)), 1200)
    ended = time.monotonic()
    print(f"300 jobs ended {ended - began:.1f} s after the first of 50 kills, {ended - last_kill:.1f} s after the last")
    found = world.jobs(namespace)
    started = sum(each["status"]["attempts"]["started"] for each in found)
    ever = Counter(attempt for where, attempt in world.created.values() if where == namespace)
    assert sum(ever.values()) == started, "no child was doubled, none is missing"
    assert len(world.children(namespace)) == 300
    verdicts = Counter(each["status"]["attempts"]["recent"][-1]["verdict"] for each in found)
    assert verdicts == {"Succeeded": 225, "Permanent": 75}


def ended_attempts(world: World, namespace: str) -> set[tuple[str, int]]:
    """Return a pair (job name, attempt number) for each attempt whose PyTorchJob has ended."""
    return {
        (child["metadata"]["labels"][JOB_NAME], int(child["metadata"]["labels"][ATTEMPT]))
        for child in world.children(namespace)
        if any(
            each["type"] in ("Succeeded", "Failed") and each["status"] == "True"
            for each in child.get("status", {}).get("conditions") or []
        )
    }


def recorded_attempts(world: World, namespace: str) -> set[tuple[str, int]]:
    """Return a pair (job name, attempt number) for each attempt whose end is recorded in the job's status."""
    return {
        (found["metadata"]["name"], attempt["number"])
        for found in world.jobs(namespace)
        for attempt in found.get("status", {}).get("attempts", {}).get("recent", [])
    }


def previous_release(commit: str, folder: Path) -> Path | None:
    """Unpack packages and CRD of ``commit`` into ``folder``, and return ``folder``. Return None where the git history
    does not contain the commit."""
    archive = subprocess.run(
        ["git", "archive", commit, "core", "operator", "crds"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if archive.returncode != 0:
        return None
    subprocess.run(["tar", "--extract", f"--directory={folder}"], input=archive.stdout, check=True)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("commit", "obeys_cancel"), [(FIRST, False), (LATER, True)])
def test_upgrade_and_rollback_restart_no_child(world: World, tmp_path: Path, commit: str, obeys_cancel: bool) -> None:
    source = previous_release(commit, tmp_path)
    if source is None:
        # The old version comes from the git history, which a shallow clone or a source archive does not have.
        pytest.skip(f"the history does not reach back to {commit}")
    namespace = world.namespace()
    world.operator.stop()
    _delete_other_jobs(world)
    server = f"https://127.0.0.1:{world.proxy.port}"
    previous = OperatorProcess(world.cluster, tmp_path, server=server, source=source, ports=(18444, 18081))
    try:
        # The test replaces the CRD with each version, as Helm does: the CRD is a template of the chart, so Helm
        # upgrades and rolls it back together with the operator.
        install_crd(world, _crd(source))
        previous.start()
        previous.wait_ready()
        world.create(namespace, *(job("run", name=f"job-{number}") for number in range(5)))
        world.wait("both pods of each", lambda: _running(world, namespace) == 5, 90)
        before = _objects(world, namespace)
        for turn in range(2):
            previous.stop()
            install_crd(world, _crd(REPOSITORY))
            world.operator.start()
            world.operator.wait_ready()
            _wait_for_reconciles(world, namespace, world.operator, "the new version")
            assert _objects(world, namespace) == before, f"upgrade {turn}"
            world.operator.stop()
            install_crd(world, _crd(source))
            previous.start()
            previous.wait_ready()
            _wait_for_reconciles(world, namespace, previous, "the previous version")
            assert _objects(world, namespace) == before, f"rollback {turn}"
        if obeys_cancel:
            _cancel(world, namespace, "job-0")
        assert previous.metric("finetune_reconciles_total", 'result="error"') == 0
    finally:
        previous.close()
        install_crd(world, _crd(REPOSITORY))


@pytest.mark.long
def test_a_rollback_from_a_newer_version_looks_after_its_jobs(world: World) -> None:
    """The newer version does not really exist. The test simulates it with a CRD without bounds, and with a different
    change from `SKEWS` to each job's status, such as longer lists, unknown words or new fields."""
    namespace = world.namespace()
    _delete_other_jobs(world)
    names = dict(zip((f"job-{number}" for number in range(len(SKEWS))), SKEWS, strict=True))
    try:
        world.create(namespace, *(job("run", name=name) for name in names))
        world.wait("both pods of each", lambda: _running(world, namespace) == len(names), 120)
        before = _objects(world, namespace)
        world.operator.stop()
        install_crd(world, _newer_crd())
        for name, skew in names.items():
            path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}"
            found = world.call("GET", path)
            # The test writes the status as a newer version of the operator would: by server-side apply, as the same
            # field manager. An object that has lost all of its fields is left out, because server-side apply would
            # turn the object into null.
            newer = {key: found[key] for key in ("apiVersion", "kind")} | {
                "metadata": {"name": name, "namespace": namespace},
                "status": without_empty_objects(SKEWS[skew](found["status"])),
            }
            query = f"fieldManager={FIELD_MANAGER}&force=true"
            world.call("PATCH", f"{path}/status?{query}", newer, content_type="application/apply-patch+yaml")
        world.operator.start()
        world.operator.wait_ready()
        _wait_for_reconciles(world, namespace, world.operator, "the older version", sorted(names))
        assert _objects(world, namespace)[:2] == before[:2]
        for name in names:
            _cancel(world, namespace, name)
        assert world.operator.metric("finetune_reconciles_total", 'result="error"') == 0
    finally:
        world.operator.stop()
        install_crd(world, _crd(REPOSITORY))


def without_empty_objects(value: Any) -> Any:
    """Return ``value``, a JSON value, without all fields whose value is an empty object, at any depth."""
    if isinstance(value, dict):
        kept = {key: without_empty_objects(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner != {}}
    return [without_empty_objects(item) for item in value] if isinstance(value, list) else value


def _delete_other_jobs(world: World) -> None:
    """Delete the jobs of earlier tests, because the test would count their reconciles too."""
    for found in world.jobs():
        metadata = found["metadata"]
        world.call("DELETE", f"/apis/{GROUP}/{VERSION}/namespaces/{metadata['namespace']}/{PLURAL}/{metadata['name']}")


def _crd(source: Path) -> dict[str, Any]:
    """Return the CRD of the checkout ``source``."""
    manifest: dict[str, Any] = yaml.safe_load((source / "crds/finetune.dev_finetunejobs.yaml").read_text())
    return manifest


def _newer_crd() -> dict[str, Any]:
    """Return a CRD whose status takes any fields, values and lengths."""
    manifest = _crd(REPOSITORY)
    schema = manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    schema["status"] = _unbounded(schema["status"])
    return manifest


def _unbounded(schema: Any) -> Any:
    """Return the structural ``schema`` without bounds, and allow unknown fields in its objects. A property `type` stays
    required, because it is the key of the list of conditions, and a key without a default must be required."""
    if isinstance(schema, list):
        return [_unbounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounds = ("maxItems", "maxLength", "maximum", "minimum", "minLength", "pattern", "enum", "required")
    result = {key: _unbounded(value) for key, value in schema.items() if key not in bounds}
    if isinstance(schema.get("properties"), dict):
        result["properties"] = {key: _unbounded(value) for key, value in schema["properties"].items()}
        result["x-kubernetes-preserve-unknown-fields"] = True
        if "type" in schema["properties"]:
            result["required"] = ["type"]
    return result


def install_crd(world: World, manifest: dict[str, Any]) -> None:
    """Replace the CRD by ``manifest``, and wait until the API server uses it. No operator may run meanwhile."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{manifest['metadata']['name']}"
    stored = world.call("GET", path)
    schema = manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["description"] = mark = uuid.uuid4().hex
    world.call("PUT", path, stored | {"spec": stored["spec"] | {"versions": manifest["spec"]["versions"]}})
    published = f"/openapi/v3/apis/{GROUP}/{VERSION}"

    def is_used() -> bool:
        # While the API server changes to the new schema, it answers 429, and the request is sent again.
        world.jobs()
        return mark in str(world.call("GET", published))

    world.wait("the API server to use the CRD", is_used, 60)


def _cancel(world: World, namespace: str, name: str) -> None:
    """Cancel the job and wait until it has ended and its pods are gone."""
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}"
    patch = {"spec": {"runPolicy": {"cancel": True}}}
    world.call("PATCH", path, patch, content_type="application/merge-patch+json")
    found = world.wait_job(namespace, "the cancelled job's end", settled, 120, name=name)
    assert condition(found, "Succeeded")["reason"] == "Cancelled"
    mine = f"/api/v1/namespaces/{namespace}/pods?labelSelector={JOB_NAME}%3D{name}"
    world.wait("its pods to be gone", lambda: not world.call("GET", mine)["items"], 60)


def _running(world: World, namespace: str) -> int:
    attempts = [found.get("status", {}).get("attempts", {}) for found in world.jobs(namespace)]
    return sum(len(each.get("current", {}).get("pods", [])) == 2 for each in attempts)


def _objects(world: World, namespace: str) -> tuple[list[str], list[str], list[int]]:
    """Return the uids of all PyTorchJobs, the uids of all pods, and each job's number of started attempts."""
    return (
        sorted(child["metadata"]["uid"] for child in world.children(namespace)),
        sorted(pod["metadata"]["uid"] for pod in world.pods(namespace)),
        [found["status"]["attempts"]["started"] for found in world.jobs(namespace)],
    )


def _wait_for_reconciles(
    world: World, namespace: str, operator: OperatorProcess, who: str, names: Sequence[str] = FIVE_JOBS
) -> None:
    """Wait until ``operator`` has requested each job of ``names`` twice since this call. A reconcile requests its job
    once, so each job was reconciled twice. Then assert that as many reconciles as there are jobs, or more, have
    succeeded, and that none has failed."""
    began = time.monotonic()
    paths = [f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}" for name in names]

    def reconciled() -> bool:
        seen = Counter(record.request.path for record in world.proxy.records if record.at > began)
        return all(seen[path] >= 2 for path in paths)

    world.wait(f"two reconciles of each job by {who}", reconciled, 90)
    # A reconcile that fails also requests its job. The requests alone therefore do not show that the reconciles
    # succeeded.
    assert operator.metric("finetune_reconciles_total", 'result="ok"') >= len(names), operator.evidence()
    assert operator.metric("finetune_reconciles_total", 'result="error"') == 0, operator.evidence()
