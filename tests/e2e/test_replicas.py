"""The chart installs the operator with two replicas. Both are Ready, and the trainer's reports go to the leader. After
the leader's pod is deleted, reports of the same attempt go to the new leader."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from examples.demo import steps
from examples.demo.steps import CHART, OPERATOR_NAMESPACE, RELEASE
from finetune_core.api.job import FineTuneJob
from tests.cluster import Cluster, wait_for
from tests.e2e.jobs import MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]

TAKEOVER_SECONDS, REPORT_SECONDS = 20, 40
"""Promised seconds after the deletion of the leader's pod: until there is a new leader, and until the status shows the
first report that the new leader got. The test allows three times as much."""


@pytest.fixture
def two_replicas(installed: Cluster) -> Iterator[Cluster]:
    """The session's cluster, with two replicas of the operator instead of one during the test."""
    upgrade = ["upgrade", RELEASE, str(CHART), "--namespace", OPERATOR_NAMESPACE, "--reset-then-reuse-values", "--wait"]
    installed.helm(*upgrade, "--set", "replicas=2", "--timeout=120s")
    yield installed
    installed.helm(*upgrade, "--set", "replicas=1", "--timeout=120s")


def operator_pods(cluster: Cluster) -> dict[str, str]:
    """Return the IP addresses of the operator's Ready pods, by the name of the pod."""
    found = cluster.get("pods", "-n", OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/name=finetune-operator")
    return {
        pod["metadata"]["name"]: pod["status"]["podIP"]
        for pod in found["items"]
        if "deletionTimestamp" not in pod["metadata"]
        and any(item["type"] == "Ready" and item["status"] == "True" for item in pod["status"]["conditions"])
    }


def leader(cluster: Cluster) -> str:
    """Return the name of the pod that holds the Lease of the leader, or an empty string if no pod does."""
    lease = cluster.get("lease", RELEASE, "-n", OPERATOR_NAMESPACE)
    return str(lease["spec"].get("holderIdentity", "")).partition("_")[0]


def service_addresses(cluster: Cluster) -> list[str]:
    """Return the IP addresses to which the Service for the trainers' reports leads."""
    found = cluster.get("endpointslice", f"{RELEASE}-leader", "-n", OPERATOR_NAMESPACE)
    return [address for endpoint in found["endpoints"] for address in endpoint["addresses"]]


def test_reports_follow_the_leader(two_replicas: Cluster, namespace: str, tiny_job: MakeJob) -> None:
    cluster = two_replicas
    assert len(operator_pods(cluster)) == 2
    steps.apply(cluster, tiny_job("followed", spec__training__maxSteps=4000), namespace)

    def reported(least: int) -> Callable[[FineTuneJob], bool]:
        return lambda job: bool(job.status and job.status.progress and job.status.progress.step >= least)

    job = steps.wait_for_job(cluster, namespace, "followed", "a report", reported(1), 240)
    assert job.status is not None
    assert job.status.progress is not None
    first = leader(cluster)
    assert service_addresses(cluster) == [operator_pods(cluster)[first]]
    cluster.kubectl("delete", "pod", first, "-n", OPERATOR_NAMESPACE, "--wait=false")
    deleted_at = time.monotonic()
    wait_for("another leader", lambda: leader(cluster) not in ("", first), 3 * TAKEOVER_SECONDS)
    took_over = time.monotonic() - deleted_at
    second = leader(cluster)
    wait_for("reports to be led to it", lambda: service_addresses(cluster) == [operator_pods(cluster).get(second)], 60)
    # Read the job again. The former leader may have written a newer step since the job was read above.
    led_at = steps.wait_for_job(cluster, namespace, "followed", "the job", lambda job: True, 60)
    assert led_at.status is not None
    assert led_at.status.progress is not None
    later = reported(led_at.status.progress.step + 1)
    job = steps.wait_for_job(
        cluster, namespace, "followed", "a report that the new leader took", later, 3 * REPORT_SECONDS
    )
    shown = time.monotonic() - deleted_at
    print(f"takeover {took_over:.1f} s, its first report in the status {shown:.1f} s, load {os.getloadavg()[0]:.1f}")
    assert job.status is not None
    assert job.status.attempts.started == 1, "training never noticed"
