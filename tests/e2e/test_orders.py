"""What a person orders while a job runs, with the real trainer: suspend and resume lose no step and no retry, cancel
leaves a checkpoint that the next job of the same run goes on from, and a run that is finished is never trained again.
"""

from __future__ import annotations

import json

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from tests.cluster import Cluster, wait_for
from tests.e2e.bucket import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1500)]

STEPS = 300
LONG_RUN = {"spec__training__maxSteps": STEPS, "spec__evaluation__everySteps": 100}
GRACE_SECONDS = 90
"""Within which the pods commit a checkpoint and are gone."""


def _change(cluster: Cluster, namespace: str, name: str, **run_policy: bool) -> None:
    patch = json.dumps({"spec": {"runPolicy": run_policy}})
    cluster.kubectl("patch", "finetunejob", name, "-n", namespace, "--type=merge", "--patch", patch)


def _checkpointed(step: int):
    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and any(checkpoint.step >= step for checkpoint in job.status.checkpoints)

    return reached


def _says(reason: str):
    def reached(job: FineTuneJob) -> bool:
        found = condition(job, ConditionType.SUCCEEDED)
        return found is not None and found.reason == reason

    return reached


def _run_folder(cluster: Cluster, namespace: str, name: str, run_id: str) -> RunFolder:
    return RunFolder(cluster, f"s3://{steps.BUCKET}/runs/{namespace}/{name}/{run_id}")


def _pods_gone(cluster: Cluster, namespace: str) -> None:
    wait_for("the pods to go", lambda: not cluster.get("pods", "-n", namespace)["items"], 2 * GRACE_SECONDS)


def _steps_of(run: RunFolder, number: int) -> list[int]:
    """Return the steps that the run of this number trained, in order."""
    return [step for logged, step in run.steps_logged() if logged == number]


def test_suspend_and_resume_lose_no_step_and_charge_nothing(installed: Cluster, namespace: str, tiny_job) -> None:
    steps.apply(installed, tiny_job("paused", **LONG_RUN), namespace)
    job = steps.wait_for_job(installed, namespace, "paused", "a checkpoint", _checkpointed(20), 300)
    run_id = job.metadata.uid
    _change(installed, namespace, "paused", suspend=True)
    steps.wait_for_job(installed, namespace, "paused", "Suspended", _says("Suspended"), 60)
    _pods_gone(installed, namespace)
    with installed.enter():
        run = _run_folder(installed, namespace, "paused", run_id)
        first = _steps_of(run, 1)
        newest = max(int(folder.name.rsplit("-", 1)[1]) for folder in run.verified("checkpoints"))
    # The last step that was trained is the one that was saved after SIGTERM, and no checkpoint was due for it.
    assert first == list(range(1, newest + 1))
    assert newest < STEPS

    _change(installed, namespace, "paused", suspend=False)
    job = steps.wait_for_condition(installed, namespace, "paused", ConditionType.SUCCEEDED, timeout=420)
    assert job.status is not None
    attempts = job.status.attempts
    assert (attempts.started, attempts.charged, attempts.free) == (2, 0, 1), attempts
    assert [(past.verdict, past.reason) for past in attempts.recent] == [
        ("Free", "Suspended"),
        ("Succeeded", "Completed"),
    ]
    with installed.enter():
        records = run.runs()
        assert [record["parent"]["step"] for record in records[1:]] == [newest]
        assert _steps_of(run, 2) == list(range(newest + 1, STEPS + 1))


def test_a_cancelled_run_goes_on_under_its_run_id_and_is_then_done_for_good(
    installed: Cluster, namespace: str, tiny_job
) -> None:
    manifest = tiny_job("study", spec__storage__runId="study-1", **LONG_RUN)
    steps.apply(installed, manifest, namespace)
    steps.wait_for_job(installed, namespace, "study", "a checkpoint", _checkpointed(20), 300)
    _change(installed, namespace, "study", cancel=True)
    job = steps.wait_for_condition(installed, namespace, "study", ConditionType.SUCCEEDED, "False", timeout=180)
    assert _says("Cancelled")(job)
    assert job.status is not None
    assert (job.status.attempts.charged, job.status.attempts.started) == (0, 1)
    with installed.enter():
        run = _run_folder(installed, namespace, "study", "study-1")
        saved = run.verified("checkpoints")
        newest = max(int(folder.name.rsplit("-", 1)[1]) for folder in saved)
        assert _steps_of(run, 1) == list(range(1, newest + 1))
        assert run.verified("artifacts") == []

    # The same job file, applied again: it goes on.
    steps.delete_job(installed, namespace, "study")
    steps.apply(installed, manifest, namespace)
    job = steps.wait_for_condition(installed, namespace, "study", ConditionType.SUCCEEDED, timeout=420)
    with installed.enter():
        assert _steps_of(run, 2) == list(range(newest + 1, STEPS + 1))
        artifact, keys = run.pointer(), run.keys()

    # And once more: the artifact is there, so nothing is trained and nothing is written.
    steps.delete_job(installed, namespace, "study")
    steps.apply(installed, manifest, namespace)
    job = steps.wait_for_condition(installed, namespace, "study", ConditionType.SUCCEEDED, timeout=180)
    assert job.status is not None
    assert job.status.artifact is not None
    assert job.status.attempts.started == 1
    with installed.enter():
        assert (run.pointer(), run.keys()) == (artifact, keys)
