"""Two jobs are applied together, and the second one starts from the adapter of the first one (`model.adapter.job`). The
second job waits without a pod until the first job has succeeded. Afterwards it goes on with exactly that adapter."""

from __future__ import annotations

import pytest

from examples.demo import steps
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_operator.messages import adapter_job_unfinished
from tests.cluster import Cluster
from tests.e2e.bucket import run_folder
from tests.e2e.jobs import MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

FIRST, SECOND = "first-round", "second-round"


def _waits_for_first(job: FineTuneJob) -> bool:
    accepted = condition(job, ConditionType.ACCEPTED)
    sentence = adapter_job_unfinished(FIRST, state="")
    return accepted is not None and accepted.status == "False" and accepted.message.startswith(sentence)


def test_a_job_waits_for_the_adapter_of_another_job_and_goes_on_with_it(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    waiting = tiny_job(SECOND)
    del waiting["spec"]["lora"]
    waiting["spec"]["model"]["adapter"] = {"job": {"name": FIRST}, "use": "Continue"}
    # The second job has the rows of the first one, so the loss of its first step shows whether it starts from weights
    # that have learned them.
    steps.apply(installed, waiting, namespace)
    steps.apply(installed, tiny_job(FIRST), namespace)

    steps.wait_for_job(installed, namespace, SECOND, "the wait for the first job", _waits_for_first, 600)
    owned = installed.kubectl("get", "pods,pytorchjobs", "-n", namespace, "-o", "name").splitlines()
    assert not [name for name in owned if SECOND in name], owned
    first = steps.wait_for_condition(installed, namespace, FIRST, ConditionType.SUCCEEDED, timeout=900)
    second = steps.wait_for_condition(installed, namespace, SECOND, ConditionType.SUCCEEDED, timeout=900)

    assert first.status is not None
    assert first.status.artifact is not None
    assert second.status is not None
    assert second.status.adapter is not None
    given = second.status.adapter
    assert given.use == "Continue"
    assert (given.job_uid, given.manifest_sha256) == (first.metadata.uid, first.status.artifact.manifest_sha256)
    assert given.sha256, "the trainer tells the digest of the adapter that it has read"
    assert second.status.attempts.started == 1
    with installed.enter():
        before = run_folder(installed, namespace, first).losses()
        after = run_folder(installed, namespace, second).losses()
    # Both jobs begin with the same batch. At least half of what the first job has learned must be there at once.
    learned = before[1] - before[max(before)]
    assert learned > 0.2
    assert before[1] - after[1] > learned / 2, (before, after)
