"""A job with the real trainer waits for a missing Secret and then for a missing bucket, and runs as soon as both exist.
Until then its condition Accepted names the missing object, no GPU is requested, and no attempt is charged."""

from __future__ import annotations

import time

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from tests.cluster import Cluster
from tests.e2e.jobs import JobPredicate, MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]

NAMED_SECONDS = 180
LATE_SECRET = "late-keys"


def _waits_for(*words: str) -> JobPredicate:
    """Return a predicate that is true when the condition Accepted is False and its message contains all ``words``."""

    def reached(job: FineTuneJob) -> bool:
        found = condition(job, ConditionType.ACCEPTED)
        return found is not None and found.status == "False" and all(word in found.message for word in words)

    return reached


def _assert_costs_nothing(job: FineTuneJob) -> None:
    stalled = condition(job, ConditionType.STALLED)
    assert stalled is not None
    assert stalled.status == "False"
    assert job.status is not None
    assert job.status.attempts.charged == 0


def test_a_secret_and_a_bucket_that_appear_later(installed: Cluster, namespace: str, tiny_job: MakeJob) -> None:
    bucket = f"late-{namespace}"
    changes = {
        "spec__storage__credentialsSecretRef": {"name": LATE_SECRET},
        "spec__storage__uri": f"s3://{bucket}/runs",
        "spec__training__maxSteps": 8,
        "spec__storage__checkpoint": {"everySteps": 4},
    }
    steps.apply(installed, tiny_job("patient", **changes), namespace)
    applied = time.monotonic()
    job = steps.wait_for_job(installed, namespace, "patient", "the Secret", _waits_for(LATE_SECRET), NAMED_SECONDS)
    print(f"the Secret is named after {time.monotonic() - applied:.1f} s")
    _assert_costs_nothing(job)
    assert installed.get("pytorchjobs", "-n", namespace)["items"] == [], "no GPU is asked for before"

    keys = {"AWS_ACCESS_KEY_ID": installed.minio.access_key, "AWS_SECRET_ACCESS_KEY": installed.minio.secret_key}
    secret = {"name": LATE_SECRET, "namespace": namespace}
    steps.apply(installed, {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "stringData": keys})
    there = time.monotonic()
    job = steps.wait_for_job(installed, namespace, "patient", "the bucket", _waits_for(bucket), NAMED_SECONDS)
    print(f"the bucket is named {time.monotonic() - there:.1f} s after the Secret is there")
    _assert_costs_nothing(job)

    steps.make_bucket(installed, bucket)
    there = time.monotonic()
    job = steps.wait_for_condition(installed, namespace, "patient", ConditionType.SUCCEEDED, timeout=420)
    print(f"succeeded {time.monotonic() - there:.1f} s after the bucket is there")
    _assert_costs_nothing(job)
    assert job.status is not None
    assert job.status.attempts.started == 1
