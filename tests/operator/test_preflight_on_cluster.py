"""Tests on a real cluster of the preflight check, and of Secrets, claims, images and quotas that come late.

The conditions must name what the job waits for, and the job must run once the missing object exists. The images of the
pods are stand-ins with scripts. tests/trainer and tests/e2e test the findings of the real check.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune_core.contract import CREDENTIALS_FOLDER, RUN_FILE, Outcome
from finetune_core.contract.preflight_result import Finding, FindingKind, PreflightResult
from tests.cluster import wait_for
from tests.cluster.node import REGISTRY
from tests.cluster.until_term import RUNS
from tests.operator.builders import result
from tests.operator.conftest import Installed, condition, settled, small_job
from tests.operator.test_life_on_cluster import objects, push
from tests.operator.test_on_cluster import StandIn, ends

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

Manifest = dict[str, Any]
RUN: Manifest = {"preflight": "Run"}
DONE = result(Outcome.COMPLETED, "done", with_artifact=True)
ONE_POD = {"nodes": 1, "gpusPerNode": 0, "device": "CPU", "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}


def checks(finding: Finding | None, then: str) -> str:
    """Return the script of a stand-in image: its preflight check reports ``finding``, its training runs ``then``."""
    answer = PreflightResult(findings=[finding] if finding else [])
    mounted = f"test -s {RUN_FILE} && test -s {CREDENTIALS_FOLDER}/AWS_ACCESS_KEY_ID || exit 99"
    message = answer.to_termination_message().replace("'", "")
    check = f"{mounted}; echo -n '{message}' > /dev/termination-log; exit {answer.exit_code}"
    return f'if [ "$0" = preflight ]; then {check}; fi; {then}'


def named(name: str, manifest: Manifest) -> Manifest:
    return manifest | {"metadata": {"name": name}}


def says(sentence: str) -> Callable[[Manifest], bool]:
    """Return a predicate on the job: Accepted is False with ``sentence``, and the job has neither ended nor started."""

    def reached(job: Manifest) -> bool:
        accepted, succeeded = condition(job, "Accepted"), condition(job, "Succeeded")
        return (
            (accepted["status"], accepted["reason"]) == ("False", "OutsideFailure")
            and sentence in accepted["message"]
            and (succeeded["status"], succeeded["reason"]) == ("Unknown", "Preflight")
            and job["status"]["attempts"]["started"] == 0
        )

    return reached


def test_a_job_that_passes_its_check_runs_and_nothing_of_the_check_is_left(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    script = checks(None, ends(0, DONE))
    installed.apply(small_job(stand_in(script), resources=ONE_POD, runPolicy=RUN), namespace)
    job = installed.wait(namespace, "the job to end", settled)
    assert condition(job, "Succeeded")["reason"] == "Completed"
    assert condition(job, "Accepted")["status"] == "True"
    assert (job["status"]["preflight"]["tries"], job["status"]["preflight"]["verdict"]) == (1, "Passed")
    assert job["status"]["attempts"]["started"] == 1

    def left() -> list[str]:
        return [name for name in objects(installed, namespace, "pods,configmaps") if "preflight" in name]

    # The kubelet removes a deleted pod when its container is gone, which the end of a short training does not wait for.
    wait_for("nothing of the check to be left", lambda: left() == [], 60)


def test_what_is_impossible_ends_the_job_before_anything_is_asked_for(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    sentence = "dataset.train.s3.uri: there is no object s3://bucket/train.jsonl"
    script = checks(Finding(kind=FindingKind.FINAL, message=sentence), RUNS)
    installed.apply(small_job(stand_in(script), runPolicy=RUN), namespace)
    job = installed.wait(namespace, "the job to end", settled)
    for kind, status in (("Succeeded", "False"), ("Stalled", "True"), ("Accepted", "False")):
        found = condition(job, kind)
        assert (found["status"], found["reason"], found["message"]) == (status, "BadInput", sentence)
    assert job["status"]["attempts"]["started"] == 0
    # The container of the preflight pod has ended before the operator deletes the pod, so the kubelet removes the pod
    # within seconds.
    wait_for("no object to be left", lambda: objects(installed, namespace, "pytorchjobs,pods,configmaps") == [], 60)


@pytest.mark.long
def test_a_check_that_is_killed_for_memory_three_times_ends_the_job_with_a_sentence(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    fills_its_memory = "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done"
    script = f'if [ "$0" = preflight ]; then {fills_its_memory}; fi; {RUNS}'
    installed.apply(small_job(stand_in(script), runPolicy=RUN), namespace)
    installed.wait(namespace, "the first try to be killed", says("at its memory limit of 1Gi"), 120)
    job = installed.wait(namespace, "the job to end", settled, 240)
    accepted, succeeded = condition(job, "Accepted"), condition(job, "Succeeded")
    assert (accepted["status"], accepted["reason"], succeeded["reason"]) == ("False", "BadInput", "BadInput")
    assert "3 tries" in succeeded["message"]
    assert "runPolicy.preflight: Skip" in succeeded["message"]
    assert job["status"]["preflight"]["tries"] == 3


@pytest.mark.long
def test_an_image_that_ignores_the_argument_preflight_is_named_and_its_pod_removed(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS), runPolicy=RUN), namespace)
    installed.wait(namespace, "the sentence", says("had not ended after 240 s"), 330)


def _volume(namespace: str) -> tuple[Manifest, Manifest]:
    """Return a PersistentVolumeClaim and a hostPath PersistentVolume for the claim."""
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"late-{namespace}"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": f"/var/tmp/{namespace}", "type": "DirectoryOrCreate"},
            "claimRef": {"namespace": namespace, "name": "late-claim"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "late-claim"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
            "volumeName": f"late-{namespace}",
        },
    }
    return claim, volume


def test_a_secret_a_claim_and_an_image_that_come_late_are_waited_for_by_name(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    image = stand_in(checks(None, RUNS))
    late_image = f"{REGISTRY}/stand-ins:late-{namespace}"
    quick = {"resources": ONE_POD, "runPolicy": RUN}
    storage = small_job(image)["spec"]["storage"] | {"credentialsSecretRef": {"name": "late-keys"}}
    installed.apply(named("secret", small_job(image, **quick, storage=storage)), namespace)
    model = {"volume": {"claimName": "late-claim", "path": "model"}}
    installed.apply(named("claim", small_job(image, **quick, model=model)), namespace)
    installed.apply(named("image", small_job(late_image, **quick)), namespace)
    installed.wait(namespace, "the missing Secret", says('secret "late-keys" not found'), 90, "secret")
    installed.wait(namespace, "the missing claim", says('persistentvolumeclaim "late-claim" not found'), 60, "claim")
    installed.wait(namespace, "the missing image", says("the image can't be pulled"), 60, "image")
    assert objects(installed, namespace, "pytorchjobs") == []

    keys = ["--from-literal=AWS_ACCESS_KEY_ID=a", "--from-literal=AWS_SECRET_ACCESS_KEY=b"]
    installed.cluster.kubectl("create", "secret", "generic", "late-keys", "-n", namespace, *keys)
    claim, volume = _volume(namespace)
    installed.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(volume))
    installed.apply(claim, namespace)
    push(installed, image, late_image)
    try:
        for name in ("secret", "claim", "image"):
            # The wait is long because the kubelet retries after up to two minutes.
            job = installed.wait(namespace, f"the job {name} to run", one_runs, 180, name)
            assert condition(job, "Accepted")["status"] == "True"
            assert job["status"]["attempts"]["charged"] == 0
    finally:
        installed.cluster.kubectl("delete", "pv", f"late-{namespace}", "--wait=false")


def one_runs(job: Manifest) -> bool:
    """Return whether a pod of the current attempt has a node."""
    current = job["status"]["attempts"].get("current")
    return bool(current and [pod for pod in current["pods"] if pod.get("node")])


def test_a_quota_that_is_used_up_is_named_and_waited_for(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    installed.apply(quota, namespace)
    image = stand_in(checks(None, RUNS))
    wait_for(
        "the quota to hold",
        lambda: installed.cluster.get("resourcequota", "none", "-n", namespace).get("status", {}).get("hard"),
        30,
    )
    installed.apply(small_job(image, resources=ONE_POD, runPolicy=RUN), namespace)
    installed.wait(namespace, "the quota", says("exceeded quota: none"))
    installed.cluster.kubectl("delete", "resourcequota", "none", "-n", namespace)
    installed.wait(namespace, "the job to run", one_runs, 90)


@pytest.mark.long
def test_what_is_missing_for_too_long_ends_the_job_with_its_name(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    sentence = "storage.uri: bucket b does not exist"
    script = checks(Finding(kind=FindingKind.OUTSIDE, message=sentence), RUNS)
    policy = RUN | {"pendingDeadlineSeconds": 60}
    installed.apply(small_job(stand_in(script), resources=ONE_POD, runPolicy=policy), namespace)
    installed.wait(namespace, "the cause", says(sentence))
    job = installed.wait(namespace, "the deadline", settled, 120)
    succeeded = condition(job, "Succeeded")
    assert (succeeded["status"], succeeded["reason"]) == ("False", "DeadlineExceeded")
    assert sentence in succeeded["message"]
    # With back-offs of 10, 20 and 40 s, the tries start after 0, 10 and 30 s at the earliest, and a fourth try after 70
    # s, which is beyond the deadline.
    assert 2 <= job["status"]["preflight"]["tries"] <= 3
    assert objects(installed, namespace, "pytorchjobs,pods,configmaps") == []
