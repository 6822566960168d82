"""Tests on a real cluster that the operator recognises what belongs to a job and what does not.

The tests use pods with copied labels, orphaned pods, and conditions that other programs have written. API server,
garbage collector, training-operator and kubelet are real. The training container is a stand-in image.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster import wait_for
from tests.cluster.until_term import RUNS
from tests.operator.conftest import Installed, condition, settled, small_job
from tests.operator.kstatus import kstatus
from tests.operator.test_on_cluster import StandIn, child_name, pods_run, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def pods(installed: Installed, namespace: str) -> dict[str, dict[str, Any]]:
    """Return the pods of the namespace that are not being deleted, by name."""
    items = installed.cluster.get("pods", "-n", namespace)["items"]
    return {item["metadata"]["name"]: item for item in items if "deletionTimestamp" not in item["metadata"]}


def test_a_copy_of_a_pod_with_its_labels_changes_nothing(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    before = installed.wait(namespace, "both pods", running)["status"]["attempts"]
    mine = pods(installed, namespace)
    original = mine[f"{before['current']['pods'][0]['name']}"]
    # The copy is made as `kubectl debug --copy-to=debug --keep-labels` makes it.
    spec = {key: value for key, value in original["spec"].items() if key != "nodeName"}
    spec["containers"][0]["image"] = stand_in("exit 64")
    metadata = {"name": "debug", "labels": original["metadata"]["labels"]}
    copy = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    installed.apply(copy, namespace)
    wait_for("the copy to end", lambda: pods(installed, namespace)["debug"]["status"]["phase"] == "Failed", 60)
    installed.operator.restart()
    job = installed.wait(namespace, "a reconcile", lambda job: condition(job, "Succeeded")["status"] == "Unknown")
    assert job["status"]["attempts"]["recent"] == []
    assert job["status"]["attempts"]["current"]["pods"] == before["current"]["pods"]
    assert original["metadata"]["name"] in pods(installed, namespace)


def test_orphaned_pods_go_a_minute_after_their_attempt_and_the_next_one_starts(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    job = installed.wait(namespace, "both pods", running)
    orphans = set(pods(installed, namespace))
    installed.cluster.kubectl("delete", "pytorchjob", child_name(job), "-n", namespace, "--cascade=orphan")
    job = installed.wait(namespace, "the end of attempt 1", lambda job: job["status"]["attempts"]["recent"])
    assert job["status"]["attempts"]["recent"][0]["reason"] == "ChildDeleted"
    assert set(pods(installed, namespace)) == orphans
    installed.wait(
        namespace,
        "both pods of attempt 2",
        lambda job: job["status"]["attempts"]["started"] == 2 and pods_run(installed, namespace),
        240,
    )
    assert orphans.isdisjoint(pods(installed, namespace))


def test_a_new_job_is_in_progress_and_an_ended_one_observes_edits(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    """kstatus reads the new job as InProgress, and the ended job as Failed, also after somebody else has added a
    condition to its status."""
    installed.operator.stop()
    installed.apply(small_job(stand_in("exit 64")), namespace)
    new = installed.job(namespace)
    assert (new["status"]["observedGeneration"], kstatus(new)) == (-1, "InProgress")
    installed.operator.restart()
    ended = installed.wait(namespace, "the job to end", settled)
    assert kstatus(ended) == "Failed"
    foreign = {
        "type": "QuotaReserved",
        "status": "True",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-11-24T12:00:00Z",
        "reason": "Http503",
        "message": "",
    }
    body = {key: ended[key] for key in ("apiVersion", "kind")} | {
        "metadata": {"name": ended["metadata"]["name"], "namespace": namespace},
        "status": {"conditions": [foreign]},
    }
    arguments = ("--server-side", "--subresource=status", "--field-manager=somebody", "-n", namespace, "-f", "-")
    installed.cluster.kubectl("apply", *arguments, stdin=json.dumps(body))
    patch = json.dumps({"spec": {"runPolicy": {"ttlSecondsAfterFinished": 86400}}})
    installed.cluster.kubectl("patch", "ftj", "quickstart", "-n", namespace, "--type=merge", "-p", patch)
    job = installed.wait(namespace, "the edit to be observed", lambda job: job["status"]["observedGeneration"] == 2, 60)
    assert kstatus(job) == "Failed"
    assert foreign in job["status"]["conditions"]
    shown = installed.cluster.get("ftj", "quickstart", "-n", namespace, "--show-managed-fields")
    entries = shown["metadata"]["managedFields"]
    assert {entry["manager"] for entry in entries if "QuotaReserved" in json.dumps(entry)} == {"somebody"}
