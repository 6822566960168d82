"""What dies costs minutes, never the run: a whole gang, three times, and the object store."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.demo import steps
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.names import attempt_name, worker_name
from tests.cluster import Cluster
from tests.e2e.bucket import RunFolder
from tests.e2e.test_recovery import _losses

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

DELETIONS = 3
STEPS = 240
CHANGES = {"spec__training__maxSteps": STEPS, "spec__evaluation__everySteps": 80}


def _run_folder(cluster: Cluster, namespace: str, job: FineTuneJob) -> RunFolder:
    return RunFolder(cluster, f"s3://{steps.BUCKET}/runs/{namespace}/{job.metadata.name}/{job.metadata.uid}")


def _committed_by(run: int):
    """Return whether the status lists a checkpoint that run ``run`` committed."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.run == run for checkpoint in job.status.checkpoints)

    return reached


def _started(attempts: int):
    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.attempts.started >= attempts

    return reached


@pytest.mark.long
def test_three_lost_gangs_and_a_restarted_store_end_in_the_same_model_and_cost_no_retry(
    installed: Cluster, namespace: str, tiny_job, tmp_path: Path
) -> None:
    steps.apply(installed, tiny_job("disturbed", **CHANGES), namespace)
    for number in range(1, DELETIONS + 1):
        job = steps.wait_for_job(
            installed, namespace, "disturbed", f"a checkpoint of run {number}", _committed_by(number), 600
        )
        child = attempt_name("disturbed", job.metadata.uid, number)
        victims = [worker_name(child, index) for index in range(job.spec.resources.nodes)]
        installed.kubectl("delete", "pod", *victims, "-n", namespace, "--wait=false")
        steps.wait_for_job(installed, namespace, "disturbed", "the next attempt", _started(number + 1), 300)
    last = DELETIONS + 1
    job = steps.wait_for_job(installed, namespace, "disturbed", f"a checkpoint of run {last}", _committed_by(last), 600)
    installed.components["minio"].restart()
    _assert_no_key_is_told(installed, namespace, attempt_name("disturbed", job.metadata.uid, last))
    job = steps.wait_for_condition(installed, namespace, "disturbed", ConditionType.SUCCEEDED, timeout=900)
    steps.apply(installed, tiny_job("undisturbed", **CHANGES), namespace)
    twin = steps.wait_for_condition(installed, namespace, "undisturbed", ConditionType.SUCCEEDED, timeout=900)

    assert job.status is not None
    attempts = job.status.attempts
    assert (attempts.started, attempts.charged, attempts.free) == (last, 0, DELETIONS), attempts
    with installed.enter():
        run = _run_folder(installed, namespace, job)
        losses, expected = _losses(run), _losses(_run_folder(installed, namespace, twin))
        committed = {(folder.manifest.run, folder.manifest.step) for folder in run.verified("checkpoints")}
        parents = [record.get("parent") for record in run.runs()]
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == expected, "a resumed run is the same run, bit for bit"
    assert parents[0] is None
    assert all(parent is not None for parent in parents[1:]), parents
    assert {(item.run, item.step) for item in job.status.checkpoints} == committed
    assert [item.step for item in job.status.checkpoints if item.last] == [STEPS]
    assert job.status.artifact is not None

    listed = installed.run(
        [sys.executable, "-m", "finetune_cli", "checkpoints", "disturbed", "-n", namespace, "--verify", "-o", "json",
         "--endpoint", installed.minio.endpoint],
        timeout=120,
    ).stdout  # fmt: skip
    assert {(item["run"], item["step"]) for item in json.loads(listed)["checkpoints"]} == committed
    installed.run(
        [sys.executable, "-m", "finetune_cli", "download", "disturbed", "-n", namespace, "-o",
         str(tmp_path / "adapter"), "--endpoint", installed.minio.endpoint],
        timeout=120,
    )  # fmt: skip
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def _assert_no_key_is_told(cluster: Cluster, namespace: str, child: str) -> None:
    """The access key is in the Secret and nowhere else: objects, logs, arguments, the processes of the machine."""
    secret = cluster.minio.secret_key
    for kind in ("configmaps", "pods", "pytorchjobs", "finetunejobs", "events"):
        assert secret not in cluster.kubectl("get", kind, "-n", namespace, "-o", "yaml"), kind
    pods = [pod["metadata"]["name"] for pod in cluster.get("pods", "-n", namespace)["items"]]
    assert any(name.startswith(child) for name in pods)
    for name in pods:
        assert secret not in cluster.kubectl("logs", name, "-n", namespace, "-c", "pytorch"), name
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked
        assert secret.encode() not in command, command
        if b"finetune_trainer" in command:
            assert secret.encode() not in environment
