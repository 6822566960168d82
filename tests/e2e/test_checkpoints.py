"""All pods of a job are deleted three times. After the second deletion the job's newest checkpoint is damaged. After
the third deletion the object store is restarted, while the next attempt trains. The training losses of the job are
still the same, bit for bit, as those of an undisturbed job, and no attempt is charged."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from examples.demo import steps
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.names import attempt_name, worker_name
from tests.cluster import Cluster
from tests.e2e.bucket import run_folder
from tests.e2e.jobs import JobPredicate, MakeJob, has_checkpoint_of_run, has_started
from tests.e2e.secrecy import assert_no_key_leaks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

DELETIONS = 3
SPOILED = 2
"""The pods are deleted `DELETIONS` times. After deletion number `SPOILED`, counted from 1, the newest checkpoint is
damaged."""
STEPS = 240
CHANGES = {"spec__training__maxSteps": STEPS, "spec__evaluation__everySteps": 80}


def _has_notice(text: str) -> JobPredicate:
    """Return a predicate that is true when the status has a notice that contains ``text``."""

    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(text in notice for notice in job.status.notices)

    return reached


def _flip_a_bit_of_the_newest(cluster: Cluster, namespace: str, job: FineTuneJob) -> str:
    """Flip one bit in a file of the newest committed checkpoint. Return the key of the file, relative to the folder of
    the job's runs."""
    run = run_folder(cluster, namespace, job)
    with cluster.enter():
        newest = run.verified("checkpoints")[-1]
        (name,) = [file.name for file in newest.manifest.files if re.match("state-00000-", file.name)]
        key = f"{newest.name}/{name}"
        data = bytearray(run.read(key))
    data[len(data) // 2] ^= 1
    steps.put_file(cluster, f"runs/{namespace}/{job.metadata.name}/{job.metadata.uid}/{key}", bytes(data))
    return key


@pytest.mark.long
def test_three_lost_gangs_and_a_restarted_store_end_in_the_same_model_and_cost_no_retry(
    installed: Cluster, namespace: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    steps.apply(installed, tiny_job("disturbed", **CHANGES), namespace)
    for number in range(1, DELETIONS + 1):
        job = steps.wait_for_job(
            installed, namespace, "disturbed", f"a checkpoint of run {number}", has_checkpoint_of_run(number), 600
        )
        child = attempt_name("disturbed", job.metadata.uid, number)
        victims = [worker_name(child, index) for index in range(job.spec.resources.nodes)]
        # kubectl waits until both pods are gone. Before their end the pods commit a checkpoint. The checkpoint can be
        # damaged safely here, because the next attempt starts only after a back-off of 10 s.
        installed.kubectl("delete", "pod", *victims, "-n", namespace, "--timeout=120s", timeout=150)
        spoiled = _flip_a_bit_of_the_newest(installed, namespace, job) if number == SPOILED else ""
        steps.wait_for_job(installed, namespace, "disturbed", "the next attempt", has_started(number + 1), 300)
        if spoiled:
            steps.wait_for_job(installed, namespace, "disturbed", f"{spoiled} in a notice", _has_notice(spoiled), 300)
    last = DELETIONS + 1
    job = steps.wait_for_job(
        installed, namespace, "disturbed", f"a checkpoint of run {last}", has_checkpoint_of_run(last), 600
    )
    installed.components["minio"].restart()
    assert_no_key_leaks(installed, namespace, attempt_name("disturbed", job.metadata.uid, last))
    job = steps.wait_for_condition(installed, namespace, "disturbed", ConditionType.SUCCEEDED, timeout=900)
    steps.apply(installed, tiny_job("undisturbed", **CHANGES), namespace)
    twin = steps.wait_for_condition(installed, namespace, "undisturbed", ConditionType.SUCCEEDED, timeout=900)

    assert job.status is not None
    attempts = job.status.attempts
    assert (attempts.started, attempts.charged, attempts.free) == (last, 0, DELETIONS), attempts
    with installed.enter():
        run = run_folder(installed, namespace, job)
        losses, expected = run.losses(), run_folder(installed, namespace, twin).losses()
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
        [
            sys.executable,
            "-m",
            "finetune_cli",
            "checkpoints",
            "disturbed",
            "-n",
            namespace,
            "--verify",
            "-o",
            "json",
            "--endpoint",
            installed.minio.endpoint,
        ],
        timeout=120,
    ).stdout
    assert {(item["run"], item["step"]) for item in json.loads(listed)["checkpoints"]} == committed
    installed.run(
        [
            sys.executable,
            "-m",
            "finetune_cli",
            "download",
            "disturbed",
            "-n",
            namespace,
            "-o",
            str(tmp_path / "adapter"),
            "--endpoint",
            installed.minio.endpoint,
        ],
        timeout=120,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
