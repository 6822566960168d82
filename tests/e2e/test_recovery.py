"""A job survives the deletion of a pod: it ends with the same losses as an undisturbed job, and no attempt is charged.
A job also survives a kill of the operator: its pods continue training, and no step is lost."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.demo import steps
from finetune_core.api.conditions import ConditionType
from finetune_core.names import attempt_name, worker_name
from tests.cluster import Cluster
from tests.cluster.waiting import wait_for
from tests.e2e.bucket import run_folder
from tests.e2e.jobs import MakeJob, has_checkpoint
from tests.e2e.secrecy import assert_no_key_leaks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LONG_RUN = {"spec__training__maxSteps": 300, "spec__evaluation__everySteps": 100}


@pytest.fixture(scope="module")
def undisturbed_losses(installed: Cluster, tiny_job: MakeJob) -> Iterator[Callable[[], dict[int, float]]]:
    """Start an undisturbed job with the same spec as the disturbed jobs. Return a function that waits until this job
    has ended, and that returns the job's loss of each step, by the number of the step."""
    namespace = f"test-{secrets.token_hex(4)}"
    steps.make_namespace(installed, namespace)
    steps.apply(installed, tiny_job("undisturbed", **LONG_RUN), namespace)

    def losses() -> dict[int, float]:
        twin = steps.wait_for_condition(installed, namespace, "undisturbed", ConditionType.SUCCEEDED, timeout=420)
        with installed.enter():
            return run_folder(installed, namespace, twin).losses()

    yield losses
    installed.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.mark.parametrize("how", ["gracefully", "by force"])
def test_a_deleted_pod_costs_no_step_and_no_retry(
    installed: Cluster,
    namespace: str,
    tiny_job: MakeJob,
    undisturbed_losses: Callable[[], dict[int, float]],
    how: str,
) -> None:
    steps.apply(installed, tiny_job("disturbed", **LONG_RUN), namespace)
    job = steps.wait_for_job(installed, namespace, "disturbed", "a checkpoint", has_checkpoint(20), 300)
    victim = worker_name(attempt_name("disturbed", job.metadata.uid, 1), 1)
    force = ["--force", "--grace-period=0"] if how == "by force" else []
    installed.kubectl("delete", "pod", victim, "-n", namespace, "--wait=false", *force)
    job = steps.wait_for_condition(installed, namespace, "disturbed", ConditionType.SUCCEEDED, timeout=420)

    assert job.status is not None
    attempts = job.status.attempts
    assert (attempts.started, attempts.charged, attempts.free) == (2, 0, 1), attempts
    assert [attempt.verdict for attempt in attempts.recent] == ["Free", "Succeeded"]
    with installed.enter():
        run = run_folder(installed, namespace, job)
        records = run.runs()
        assert len(records) == 2
        parent = records[1]["parent"]
        assert parent is not None, "the second run must go on from a checkpoint of the first"
        assert parent["step"] >= 20
        losses = run.losses()
    assert sorted(losses) == list(range(1, 301))
    assert losses == undisturbed_losses(), "a resumed run must be the same run, bit for bit"


def test_an_operator_killed_in_mid_run_loses_and_doubles_nothing(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    steps.apply(installed, tiny_job("survivor", **LONG_RUN), namespace)
    job = steps.wait_for_job(installed, namespace, "survivor", "a checkpoint", has_checkpoint(20), 300)
    assert_no_key_leaks(installed, namespace, attempt_name("survivor", job.metadata.uid, 1))
    pods_before = _pod_uids(installed, namespace)
    restarts = _operator_restarts(installed)
    os.kill(_operator_process(installed), signal.SIGKILL)
    wait_for("a new operator container", lambda: _operator_restarts(installed) > restarts, 120)
    job = steps.wait_for_condition(installed, namespace, "survivor", ConditionType.SUCCEEDED, timeout=420)

    assert job.status is not None
    assert job.status.attempts.started == 1
    assert job.status.attempts.recent[-1].verdict == "Succeeded"
    children = installed.get("pytorchjobs", "-n", namespace)["items"]
    assert [child["metadata"]["name"] for child in children] == [attempt_name("survivor", job.metadata.uid, 1)]
    assert _pod_uids(installed, namespace) == pods_before
    with installed.enter():
        run = run_folder(installed, namespace, job)
        assert len(run.runs()) == 1
        assert [step for _, step in run.steps_logged()] == list(range(1, 301))
    shown = [point.step for point in job.status.history]
    assert shown == sorted(set(shown))
    assert shown[-1] == 300


def _pod_uids(cluster: Cluster, namespace: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in cluster.get("pods", "-n", namespace)["items"]}


def _operator_restarts(cluster: Cluster) -> int:
    pods = cluster.get("pods", "-n", steps.OPERATOR_NAMESPACE)["items"]
    return sum(status["restartCount"] for pod in pods for status in pod["status"].get("containerStatuses", []))


def _operator_process(cluster: Cluster) -> int:
    """Return the process id, in the machine's PID namespace, of the operator that runs in its container."""
    (pod,) = cluster.get("pods", "-n", steps.OPERATOR_NAMESPACE)["items"]
    uid = pod["metadata"]["uid"]
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            groups, command = (folder / "cgroup").read_text(), (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has ended since the folder was listed.
        if uid in groups.replace("_", "-") and b"finetune_operator" in command:
            found.append(int(folder.name))
    assert found, f"no process of pod {uid}"
    return min(found)
