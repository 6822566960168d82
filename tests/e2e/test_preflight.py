"""The preflight check with the real trainer image: how many seconds it adds to a job, and how a job waits for a missing
bucket."""

from __future__ import annotations

import os

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from tests.cluster import Cluster
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROMISED_SECONDS = 20
LATE_BUCKET = "late-bucket"


def _names_the_bucket(job: FineTuneJob) -> bool:
    accepted = condition(job, ConditionType.ACCEPTED)
    return accepted is not None and accepted.status == "False" and LATE_BUCKET in accepted.message


@pytest.mark.long
def test_a_bucket_that_comes_late_is_waited_for_and_then_used(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    storage = tiny_job("late")["spec"]["storage"] | {"uri": f"s3://{LATE_BUCKET}/runs"}
    steps.apply(installed, tiny_job("late", spec__storage=storage, spec__training__maxSteps=2), namespace)
    # The wait is long, because the node may have to pull the trainer's image first, which takes minutes.
    job = steps.wait_for_job(installed, namespace, "late", "the missing bucket", _names_the_bucket, 300)
    assert job.status is not None
    assert job.status.attempts.started == 0
    accepted = condition(job, ConditionType.ACCEPTED)
    assert accepted is not None
    assert accepted.reason == "OutsideFailure"
    assert accepted.message.startswith(f"storage.uri: bucket '{LATE_BUCKET}' does not exist at http://")
    pytorchjobs = installed.get("pytorchjobs", "-n", namespace)["items"]
    assert pytorchjobs == []

    # Nothing is missing for the second job. The seconds that the check adds to this job are the seconds from the start
    # of the check to the start of attempt 1.
    steps.apply(installed, tiny_job("twin", spec__training__maxSteps=2), namespace)
    twin = steps.wait_for_condition(installed, namespace, "twin", ConditionType.SUCCEEDED, timeout=300)
    assert twin.status is not None
    assert twin.status.preflight is not None
    assert twin.status.start_time is not None
    assert (twin.status.preflight.tries, twin.status.preflight.verdict) == (1, "Passed")
    added = (twin.status.start_time - twin.status.preflight.start_time).total_seconds()
    print(f"the check added {added:.0f} s (load {os.getloadavg()[0]:.1f})")
    assert added <= 3 * PROMISED_SECONDS

    steps.make_bucket(installed, LATE_BUCKET)
    job = steps.wait_for_condition(installed, namespace, "late", ConditionType.SUCCEEDED, timeout=300)
    assert job.status is not None
    assert (job.status.attempts.started, job.status.attempts.charged) == (1, 0)
    assert condition(job, ConditionType.ACCEPTED).status == "True"  # type: ignore[union-attr]
    left = installed.kubectl("get", "pods,configmaps", "-n", namespace, "-o", "name")
    assert "preflight" not in left
    with installed.enter():
        run = RunFolder(installed, f"s3://{LATE_BUCKET}/runs/{namespace}/late/{job.metadata.uid}")
        assert len(run.verified("artifacts")) == 1
        assert run.keys("preflight/") == []
