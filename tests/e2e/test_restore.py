"""After a cluster is built anew or restored from a backup, its jobs do not repeat training that was done before.

A job that Velero restores, or that is applied from Git, has a new uid and no status. The test creates the same
situation by deleting a job and applying the same manifest again. The API server, the object store, the preflight check
and the trainer are real.
"""

from __future__ import annotations

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.layout import run_root_of
from tests.cluster import Cluster
from tests.cluster.waiting import wait_for
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import STARTED_SECONDS, JobPredicate, MakeJob, Manifest, has_started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, INTERRUPTED = 600, 20
"""Number of steps of the job, and the step after which the first job is deleted. The remaining steps take much longer
than the deletion, so that the first job is still unfinished when it is deleted."""


def stepped(step: int) -> JobPredicate:
    def reached(job: FineTuneJob) -> bool:
        return job.status is not None and job.status.progress is not None and job.status.progress.step >= step

    return reached


def lose(cluster: Cluster, namespace: str, name: str) -> None:
    """Delete the job with everything that it owns, so that its uid and its status are lost."""
    cluster.kubectl("delete", "finetunejob", name, "-n", namespace)
    wait_for("the pods to be gone", lambda: cluster.get("pods", "-n", namespace)["items"] == [], 120)


def ended(cluster: Cluster, namespace: str, manifest: Manifest) -> FineTuneJob:
    """Apply the job, and return it once it has succeeded."""
    steps.apply(cluster, manifest, namespace)
    name = manifest["metadata"]["name"]
    return steps.wait_for_condition(cluster, namespace, name, ConditionType.SUCCEEDED, timeout=420)


def test_a_job_without_status_and_uid_resumes_its_run_and_settles_once_it_is_done(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    rows = f"data/{namespace}/train.jsonl"
    content = b"".join(b'{"question": "What is %d?", "answer": "It is %d."}\n' % (n, n) for n in range(64))
    steps.put_file(installed, rows, content)
    manifest = tiny_job(
        "restored",
        spec__training__maxSteps=STEPS,
        spec__storage__checkpoint={"everySteps": 1000},
        spec__dataset={
            "train": {"s3": {"uri": f"s3://{steps.BUCKET}/{rows}"}},
            "format": {"promptCompletion": {"promptField": "question", "completionField": "answer"}},
            "maxLength": 256,
        },
    )
    steps.apply(installed, manifest, namespace)
    first = steps.wait_for_job(installed, namespace, "restored", "some steps", stepped(INTERRUPTED), 400)
    lose(installed, namespace, "restored")

    # The first job was not finished: the second job resumes from the checkpoint that the first committed when it was
    # deleted.
    second = ended(installed, namespace, manifest)
    assert second.status is not None
    assert second.status.preflight is not None
    taken = second.status.preflight.taken_over
    assert taken is not None
    assert (taken.run_id, taken.uid) == (first.metadata.uid, first.metadata.uid)
    assert taken.step >= INTERRUPTED
    assert "storage.runId" in taken.message
    assert second.status.attempts.started == 1
    assert run_root_of(second, second.status.preflight) == run_root_of(first)
    with installed.enter():
        folder = RunFolder(installed, run_root_of(first))
        records, logged = folder.runs(), [step for _, step in folder.steps_logged()]
    assert [record["uid"] for record in records] == [first.metadata.uid, second.metadata.uid]
    assert records[1]["parent"] == {"run": 1, "step": taken.step}
    assert logged == list(range(1, STEPS + 1)), "no step is trained twice"

    # The second job was finished: the third job takes its artifact over without a training pod.
    lose(installed, namespace, "restored")
    third = ended(installed, namespace, manifest)
    assert third.status is not None
    assert third.status.preflight is not None
    assert third.status.attempts.started == 0
    assert third.status.artifact == second.status.artifact
    succeeded = condition(third, ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert (succeeded.reason, "storage.runId" in succeeded.message) == ("Completed", True)
    assert installed.get("pytorchjobs", "-n", namespace)["items"] == []
    wait_for("the check to be gone", lambda: installed.get("pods", "-n", namespace)["items"] == [], 60)
    with installed.enter():
        assert len(folder.runs()) == 2, "nothing was trained again"

    # A job with another seed, and then a job with other data, does not take over the former run and trains anew.
    lose(installed, namespace, "restored")
    other_seed = {**manifest, "spec": {**manifest["spec"], "training": {**manifest["spec"]["training"], "seed": 7}}}
    for changed, data in ((other_seed, content), (manifest, content + b'{"question": "And?", "answer": "No."}\n')):
        steps.put_file(installed, rows, data)
        steps.apply(installed, changed, namespace)
        anew = steps.wait_for_job(installed, namespace, "restored", "attempt 1", has_started(1), STARTED_SECONDS)
        assert anew.status is not None
        assert anew.status.preflight is not None
        assert anew.status.preflight.taken_over is None
        lose(installed, namespace, "restored")
