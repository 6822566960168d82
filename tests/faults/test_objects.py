"""R2 and R10 to R13 of docs/performance.md.

The cases are: restarts without changes, bursts of updates, edited PyTorchJobs, deletion of a namespace while the
operator is down, and one unreadable job among many valid jobs.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.faults.admin import MERGE_PATCH, RefusedError
from tests.faults.essence import events
from tests.faults.world import World, condition, job, settled

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"


def job_path(namespace: str, name: str = "job") -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}"


def running(found: dict[str, Any]) -> bool:
    """Return whether the status lists both pods of the current attempt."""
    return len(found["status"]["attempts"].get("current", {}).get("pods", [])) == 2


def reconciles(world: World, path: str, since: float) -> int:
    """Return how often the operator has read the job at ``path`` since the monotonic time ``since``."""
    return sum(record.request.path == path and record.at > since for record in world.proxy.records)


def test_a_restart_with_settled_jobs_writes_nothing(world: World) -> None:
    namespace = world.namespace()
    names = [f"job-{number}" for number in range(20)]
    world.create(namespace, *(job("done", name=name) for name in names))
    world.wait("all to be done", lambda: all(settled(found) for found in world.jobs(namespace)), 180)
    versions = {found["metadata"]["name"]: found["metadata"]["resourceVersion"] for found in world.jobs(namespace)}
    began = time.monotonic()
    world.operator.restart()
    world.wait(
        "a reconcile of every job",
        lambda: all(reconciles(world, job_path(namespace, name), began) for name in names),
        60,
    )
    written = [
        record.request
        for record in world.proxy.records
        if record.wrote and record.at > began and record.request.namespace == namespace
    ]
    assert written == []
    now = {found["metadata"]["name"]: found["metadata"]["resourceVersion"] for found in world.jobs(namespace)}
    assert now == versions


def test_a_hundred_updates_lead_to_a_handful_of_reconciles(world: World) -> None:
    namespace = world.namespace()
    world.create(namespace, job("run"))
    world.wait_job(namespace, "both pods", running)
    for number in range(100):
        policy = {"spec": {"runPolicy": {"maxRetries": number % 7}}}
        world.call("PATCH", job_path(namespace), policy, content_type=MERGE_PATCH)
    last = time.monotonic()
    final = world.job(namespace)["metadata"]["generation"]
    told = world.wait_job(namespace, "the last one", lambda found: found["status"]["observedGeneration"] == final)
    seen = told["metadata"]["resourceVersion"]
    # The operator's last status write changes the job, and so causes one more reconcile.
    world.wait("the reconcile after it", lambda: reconciles(world, job_path(namespace), last) >= 2, 30)
    # One more reconcile is allowed for every ten seconds. The stub node's pods send no reports, so the job's condition
    # Running is never True, and the operator reconciles such a job every ten seconds.
    assert reconciles(world, job_path(namespace), last) <= 3 + (time.monotonic() - last) / 10
    assert world.job(namespace)["metadata"]["resourceVersion"] == seen
    assert told["status"]["attempts"]["started"] == 1


@pytest.mark.long
def test_an_edited_child_is_left_alone_and_a_resized_one_ends_the_attempt(world: World) -> None:
    namespace = world.namespace()
    world.create(namespace, job("run"))
    before = world.wait_job(namespace, "both pods", running)
    (child,) = world.children(namespace)
    path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs/{child['metadata']['name']}"
    since = time.monotonic()
    edited = world.call("PATCH", path, {"metadata": {"labels": {"of": "somebody"}}}, content_type=MERGE_PATCH)
    world.wait("a reconcile after the edit", lambda: reconciles(world, job_path(namespace), since), 30)
    world.wait("a second reconcile", lambda: reconciles(world, job_path(namespace), since) > 1, 60)
    (found,) = world.children(namespace)
    assert found["metadata"]["labels"]["of"] == "somebody"
    assert found["metadata"]["uid"] == edited["metadata"]["uid"]
    assert world.job(namespace)["status"]["attempts"] == before["status"]["attempts"]

    replicas = {"spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 3}}}}
    world.call("PATCH", path, replicas, content_type=MERGE_PATCH)
    after = world.wait_job(namespace, "attempt 2", lambda told: told["status"]["attempts"]["started"] == 2, 90)
    (past,) = after["status"]["attempts"]["recent"]
    assert (past["verdict"], past["reason"]) == ("Free", "ChildChanged")


def test_a_namespace_goes_without_the_operator(world: World) -> None:
    namespace = world.namespace()
    world.create(namespace, job("run"))
    world.wait_job(namespace, "both pods", running)
    world.operator.stop()
    world.call("DELETE", f"/api/v1/namespaces/{namespace}")
    began = time.monotonic()
    world.wait("the namespace to be gone", lambda: world.find(f"/api/v1/namespaces/{namespace}") is None, 120)
    print(f"the namespace was gone after {time.monotonic() - began:.1f} s")


def poison_among(world: World, good: int) -> None:
    """Create a job that the operator can't parse, and as many valid jobs as ``good`` says. Assert that the valid jobs
    end as usual, and that the operator says why it refuses the unreadable job and reconciles this job only rarely.

    The API server stores the unreadable job because the CRD accepts any text in `longRows` for a while, as the CRD of
    another version could.
    """
    crd = world.call("GET", CRD)
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rows = spec["properties"]["dataset"]["properties"]["longRows"]
    choices = rows.pop("enum")
    lax = {"spec": {"versions": crd["spec"]["versions"]}}
    world.call("PATCH", CRD, lax, content_type=MERGE_PATCH)
    namespace = world.namespace()
    try:
        poison = job("done", name="poison")
        poison["spec"]["dataset"]["longRows"] = "Perhaps"
        world.wait("the lax schema", lambda: _is_taken(world, namespace, poison), 60)
        began = time.monotonic()
        world.create(namespace, *(job("done", name=f"good-{number}") for number in range(good)))

        def good_ones_are_done() -> bool:
            world.keep_operator_alive()
            done = [found for found in world.jobs(namespace) if settled(found)]
            return len(done) == good

        world.wait("the good jobs", good_ones_are_done, 600, interval=1)
        took = time.monotonic() - began
        told = world.job(namespace, "poison")
        assert condition(told, "Accepted")["status"] == "False"
        assert "longRows" in condition(told, "Accepted")["message"]
        assert condition(told, "Stalled")["status"] == "False"
        # The operator retries after 10 s, 20 s, 40 s and so on. Its own writes to the job's status cause a few more
        # reconciles.
        assert reconciles(world, job_path(namespace, "poison"), began) <= 8 + took / 10
        assert events(world, namespace)["BadInput"] <= 1 + took / 60
        print(f"{good} good jobs beside a poisoned one: {took:.1f} s")
    finally:
        rows["enum"] = choices
        if world.find(job_path(namespace, "poison")):
            world.call("DELETE", job_path(namespace, "poison"))
        world.call("PATCH", CRD, lax, content_type=MERGE_PATCH)


def _is_taken(world: World, namespace: str, manifest: dict[str, Any]) -> bool:
    try:
        world.create(namespace, manifest)
    except RefusedError as error:
        if error.status != 422:
            raise
        return False
    return True


def test_a_poisoned_job_harms_no_other(world: World) -> None:
    poison_among(world, 20)


@pytest.mark.long
def test_a_poisoned_job_harms_none_of_two_hundred(world: World) -> None:
    poison_among(world, 200)
