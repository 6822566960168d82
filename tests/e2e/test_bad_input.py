"""The preflight check finds mistakes in a job's spec, and refused credentials, before any attempt starts. A condition
names the problem within about a minute."""

from __future__ import annotations

import time
from typing import Any

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from tests.cluster import Cluster
from tests.e2e.jobs import JobPredicate, MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

WITHIN_SECONDS = 60


def _says(*words: str) -> JobPredicate:
    """Return a predicate that is true when the message of a condition contains all ``words`` and the condition is not
    True."""

    def reached(job: FineTuneJob) -> bool:
        conditions = job.status.conditions if job.status else []
        return any(all(word in item.message for word in words) for item in conditions if item.status != "True")

    return reached


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"spec__dataset__train": {"s3": {"uri": "s3://finetune/data/nowhere.jsonl"}}},
            ("dataset.train", "nowhere.jsonl"),
        ),
        (
            {"spec__dataset__format__promptCompletion__completionField": "answer"},
            ("completionField", "answer"),
        ),
    ],
    ids=["missing dataset", "wrong column"],
)
def test_bad_data_ends_the_job_with_its_name(
    installed: Cluster,
    namespace: str,
    tiny_job: MakeJob,
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    steps.apply(installed, tiny_job("wrong", **changes), namespace)
    job = _ended(installed, namespace, "wrong")
    succeeded, stalled = condition(job, ConditionType.SUCCEEDED), condition(job, ConditionType.STALLED)
    assert succeeded is not None
    assert (succeeded.status, succeeded.reason) == ("False", "BadInput")
    assert all(word in succeeded.message for word in words), succeeded.message
    assert "Traceback" not in succeeded.message
    assert stalled is not None
    assert stalled.status == "True"
    assert job.status is not None
    # The preflight check found the mistake. No attempt started, so no pod has requested a GPU.
    assert job.status.attempts.started == 0
    assert job.status.preflight is not None
    assert (job.status.preflight.tries, job.status.preflight.verdict) == (1, "Impossible")


def _ended(cluster: Cluster, namespace: str, name: str) -> FineTuneJob:
    """Wait until the job has ended and return the job. Print the seconds of the wait. Fail if the wait takes more than
    three minutes, which is three times the promised time."""
    started = time.monotonic()
    with steps.jobs_in(cluster, namespace) as jobs:
        for job in jobs.follow(name, lambda sentence: None, give_up_after=3 * WITHIN_SECONDS):
            found = condition(job, ConditionType.SUCCEEDED)
            if found is not None and found.status != "Unknown":
                print(f"{name}: {found.reason} after {time.monotonic() - started:.1f} s: {found.message}")
                return job
    raise AssertionError("follow has no end")


def test_refused_credentials_are_named_and_retried_slowly(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    secret = {"name": "wrong-keys", "namespace": namespace}
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "not-the-secret-key"}
    steps.apply(installed, {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "stringData": keys})
    steps.apply(installed, tiny_job("refused", spec__storage__credentialsSecretRef={"name": "wrong-keys"}), namespace)
    started = time.monotonic()
    job = steps.wait_for_job(installed, namespace, "refused", "the cause", _says("credentials"), 3 * WITHIN_SECONDS)
    seconds = time.monotonic() - started
    print(f"refused credentials named after {seconds:.1f} s")
    assert job.status is not None
    assert job.status.preflight is not None
    accepted = condition(job, ConditionType.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", "OutsideFailure")
    # At most three tries of the preflight check fit into a minute, because the pause before the next try is 10 s at
    # first and doubles each time.
    assert job.status.preflight.tries <= 3
    assert job.status.attempts.started == 0
    # As soon as the Secret holds the right keys, the job must go on without any other action.
    right = {"AWS_ACCESS_KEY_ID": installed.minio.access_key, "AWS_SECRET_ACCESS_KEY": installed.minio.secret_key}
    steps.apply(installed, {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "stringData": right})
    job = steps.wait_for_condition(installed, namespace, "refused", ConditionType.SUCCEEDED, timeout=300)
    assert job.status is not None
    texts = " ".join(item.message for item in job.status.conditions)
    assert "not-the-secret-key" not in texts
