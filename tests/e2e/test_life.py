"""A job loses no step when it is suspended, evicted by its queue, or deleted and created again: it resumes from the
checkpoint that its pods commit after SIGTERM. A cancelled job keeps the checkpoint that its pods commit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from examples.demo import steps
from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.job import FineTuneJob
from finetune_core.names import attempt_name
from tests.cluster import Cluster
from tests.cluster.kueue import Kueue, PodSetInfo, suspending_webhook
from tests.cluster.waiting import wait_for
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import LEFT_SECONDS, STARTED_SECONDS, JobPredicate, MakeJob, has_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 300
# With these changes no checkpoint is due before the job's last step, which is step 300. A checkpoint of an earlier step
# must therefore have been committed because of SIGTERM.
QUIET_RUN = {
    "spec__training__maxSteps": STEPS,
    "spec__evaluation__everySteps": 1000,
    "spec__storage__checkpoint": {"everySteps": 1000},
}


def stepped(step: int) -> JobPredicate:
    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.progress is not None and job.status.progress.step >= step

    return reached


def says(reason: Reason) -> JobPredicate:
    def reached(job: FineTuneJob) -> bool:
        conditions = job.status.conditions if job.status else []
        return any(item.type == ConditionType.SUCCEEDED and item.reason == reason for item in conditions)

    return reached


def patch(cluster: Cluster, namespace: str, name: str, **policy: Any) -> None:
    change = json.dumps({"spec": {"runPolicy": policy}})
    cluster.kubectl("patch", "finetunejob", name, "-n", namespace, "--type=merge", "-p", change)


def pods_gone(cluster: Cluster, namespace: str) -> None:
    wait_for("the pods to be gone", lambda: cluster.get("pods", "-n", namespace)["items"] == [], LEFT_SECONDS)


def newest_step(cluster: Cluster, folder: str, run: int) -> int:
    """Return the step of the newest checkpoint that run ``run`` committed into the bucket folder `runs/` + ``folder``,
    where ``folder`` is `<namespace>/<name>/<runId>`. Assert that the bytes of all checkpoints are intact."""
    with cluster.enter():
        folders = RunFolder(cluster, f"s3://{steps.BUCKET}/runs/{folder}").verified("checkpoints")
    return max(folder.manifest.step for folder in folders if folder.manifest.run == run)


def test_suspended_by_the_field_and_by_its_queue_a_job_loses_no_step(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    kueue = Kueue(installed, namespace)
    with suspending_webhook(installed, namespace):
        manifest = tiny_job("held", **QUIET_RUN, spec__runPolicy={"queueName": "gpu", "maxRetries": 0})
        steps.apply(installed, manifest, namespace)
        job = steps.wait_for_job(installed, namespace, "held", "the queue", says(Reason.QUEUED), STARTED_SECONDS)
        child = attempt_name("held", job.metadata.uid, 1)
        wait_for("the child", lambda: kueue.is_held(child), 30)
        kueue.admit(child, PodSetInfo(labels={"kueue.x-k8s.io/podset": "worker"}))
        steps.wait_for_job(installed, namespace, "held", "some steps", stepped(30), STARTED_SECONDS)

        kueue.evict(child)
        steps.wait_for_job(installed, namespace, "held", "the queue", says(Reason.QUEUED), 60)
        pods_gone(installed, namespace)
        first_stop = newest_step(installed, f"{namespace}/held/{job.metadata.uid}", run=1)
        wait_for("no pod to be active", lambda: not kueue.is_active(child), 60)
        kueue.admit(child, PodSetInfo(labels={"kueue.x-k8s.io/podset": "worker"}))
        job = steps.wait_for_job(installed, namespace, "held", "more steps", stepped(120), STARTED_SECONDS)
        assert job.status is not None
        assert (job.status.attempts.started, job.status.attempts.charged, job.status.attempts.free) == (1, 0, 0)

        patch(installed, namespace, "held", suspend=True)
        job = steps.wait_for_job(installed, namespace, "held", "the rest", says(Reason.SUSPENDED), LEFT_SECONDS)
        pods_gone(installed, namespace)
        second_stop = newest_step(installed, f"{namespace}/held/{job.metadata.uid}", run=2)
        shown = has_checkpoint(second_stop)
        steps.wait_for_job(installed, namespace, "held", "the last checkpoint in the status", shown, 60)
        patch(installed, namespace, "held", suspend=False)
        second = attempt_name("held", job.metadata.uid, 2)
        wait_for("the child", lambda: kueue.is_held(second), 60)
        kueue.admit(second, PodSetInfo())
        job = steps.wait_for_condition(installed, namespace, "held", ConditionType.SUCCEEDED, timeout=420)

    assert job.status is not None
    attempts = job.status.attempts
    assert (attempts.started, attempts.charged, attempts.free) == (2, 0, 1)
    assert [past.reason for past in attempts.recent] == ["Suspended", "Completed"]
    with installed.enter():
        run = RunFolder(installed, f"s3://{steps.BUCKET}/runs/{namespace}/held/{job.metadata.uid}")
        records = run.runs()
        logged = [step for _, step in run.steps_logged()]
    assert [record["attempt"] for record in records] == [1, 1, 2]
    # Each run must resume at the step at which the run before it stopped, so that no step is trained twice.
    assert [record["parent"] for record in records[1:]] == [
        {"run": 1, "step": first_stop},
        {"run": 2, "step": second_stop},
    ]
    assert first_stop >= 30
    assert second_stop >= 120
    assert logged == list(range(1, STEPS + 1))
    assert job.status.usage is not None
    assert job.status.usage.active_seconds > 0


def test_a_job_created_anew_with_its_run_id_resumes_and_later_finds_its_artifact(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    manifest = tiny_job("again", **QUIET_RUN)
    manifest["spec"]["storage"]["runId"] = "study-7"
    steps.apply(installed, manifest, namespace)
    first = steps.wait_for_job(installed, namespace, "again", "some steps", stepped(30), STARTED_SECONDS)
    installed.kubectl("delete", "finetunejob", "again", "-n", namespace)
    pods_gone(installed, namespace)

    steps.apply(installed, manifest, namespace)
    second = steps.wait_for_condition(installed, namespace, "again", ConditionType.SUCCEEDED, timeout=420)
    assert second.metadata.uid != first.metadata.uid
    assert second.status is not None
    assert second.status.artifact is not None
    with installed.enter():
        run = RunFolder(installed, f"s3://{steps.BUCKET}/runs/{namespace}/again/study-7")
        records = run.runs()
        logged = [step for _, step in run.steps_logged()]
    assert len(records) == 2
    assert records[1]["parent"]["step"] >= 30
    assert logged == list(range(1, STEPS + 1))

    installed.kubectl("delete", "finetunejob", "again", "-n", namespace)
    pods_gone(installed, namespace)
    steps.apply(installed, manifest, namespace)
    third = steps.wait_for_condition(installed, namespace, "again", ConditionType.SUCCEEDED, timeout=STARTED_SECONDS)
    assert third.status is not None
    assert third.status.artifact == second.status.artifact
    assert third.status.attempts.started == 0, "the preflight check finds the artifact, and no attempt is needed"
    with installed.enter():
        assert len(run.runs()) == 2, "nothing was trained again"


def test_cancel_commits_a_checkpoint_and_keeps_it(installed: Cluster, namespace: str, tiny_job: MakeJob) -> None:
    steps.apply(installed, tiny_job("given-up", **QUIET_RUN), namespace)
    job = steps.wait_for_job(installed, namespace, "given-up", "some steps", stepped(30), STARTED_SECONDS)
    patch(installed, namespace, "given-up", cancel=True)

    def ended(job: FineTuneJob) -> bool:
        conditions = job.status.conditions if job.status else []
        return any(item.type == ConditionType.STALLED and item.status == "True" for item in conditions)

    job = steps.wait_for_job(installed, namespace, "given-up", "the end", ended, LEFT_SECONDS)
    assert job.status is not None
    (succeeded,) = [item for item in job.status.conditions if item.type == ConditionType.SUCCEEDED]
    assert (succeeded.status, succeeded.reason) == ("False", Reason.CANCELLED)
    assert installed.get("pods", "-n", namespace)["items"] == []
    with installed.enter():
        run = RunFolder(installed, f"s3://{steps.BUCKET}/runs/{namespace}/given-up/{job.metadata.uid}")
        (folder,) = run.verified("checkpoints")
    assert folder.manifest.step >= 30
    assert job.status.checkpoints[-1].step == folder.manifest.step
    assert folder.name in succeeded.message
